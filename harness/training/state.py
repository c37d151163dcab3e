"""The state of a run as tensors by name, and back into model, averages and optimizer."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import broadcast, broadcast_object_list

from harness.cli.flags import named
from harness.data.batches import DRAWS
from harness.errors import UserError
from harness.models.weights import clean_state_dict, plain_state_dict
from harness.processes import on_main
from harness.training.checkpoint import Damaged, load_checkpoint, newest_valid
from harness.training.folder import check_nothing_lost, is_cleared

# For each older rule by which augmentation was drawn, the last commit that continues its
# checkpoints. "by batch": every process drew for the whole batch; checkpoints did not name it yet
CONTINUED_BY = {"by batch": "b75d8de"}
BRING_BACK = "Bring them back to continue this run, or give another --run_name to start anew"
UNSCORED = [
    "epoch",
    "loss",
    "mixed_acc",
    "steps",
    "images_per_second",
]  # of an epoch that has ended
SUMS = ("loss", "mixed_acc", "grad_norm")  # what is summed over the steps of an interval


def gather_tensors(model, optimizer, ema):
    """{"model": {name: tensor}, "optimizer": ..., "ema": ...}: what a checkpoint holds, uncopied.

    model: the unwrapped module; optimizer: torch's; ema: a ModelEma or None. The optimizer's
    tensors are named "PARAMETER//KEY", so they do not depend on the order of the groups.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}//{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if value is not None
    }
    averages = {"ema": ema.tensors()} if ema else {}
    return {"model": plain_state_dict(model), "optimizer": moments, **averages}


def restore_tensors(path, tensors, model, optimizer, ema, moments=None):
    """Put the tensors of `gather_tensors` back; raises UserError before anything is changed.

    moments: how many tensors the optimizer had, where that is known.
    """
    if moments not in (None, len(tensors["optimizer"])):
        raise UserError(
            f"{path}/optimizer.safetensors has {len(tensors['optimizer'])} tensors instead of "
            f"{moments}"
        )
    _check(path, "model", tensors["model"], clean_state_dict(model))
    if bool(ema) != ("ema" in tensors):
        raise UserError(f"{path} and --ema_decay differ on whether weights are averaged")
    if ema:
        _check(path, "ema", tensors["ema"], ema.tensors())
    optimizer_state = _optimizer_state(path, tensors["optimizer"], model, optimizer)
    model.load_state_dict(tensors["model"])
    if ema:
        ema.load_state_dict(tensors["ema"])
    optimizer.load_state_dict(optimizer_state)


def copy_by_kind(tensors):
    """Copies of the values of `tensors`: one vector of the floats, one of the integers."""
    return [torch.cat([t.detach().reshape(-1) for t in kind]) for kind in _kinds(tensors)]


@torch.no_grad()
def write_back(tensors, vector):
    """Give the tensors the values of `vector`, one after the other, in one call for all."""
    pieces = vector.split([t.numel() for t in tensors])
    if tensors:
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)])


@torch.no_grad()
def put_back(tensors, copies, condition):
    """Give the tensors the values of `copy_by_kind` again where `condition` is true.

    condition: a 0-d boolean on the device, which the host need not know. torch.where chooses
    values; arithmetic with the condition would keep NaN.
    """
    for kind, old, new in zip(_kinds(tensors), copies, copy_by_kind(tensors), strict=True):
        pieces = torch.where(condition, old, new).split([t.numel() for t in kind])
        torch._foreach_copy_(kind, [p.view(t.shape) for p, t in zip(pieces, kind, strict=True)])


def _kinds(tensors):
    floats = [t for t in tensors if t.is_floating_point()]
    integers = [t for t in tensors if not t.is_floating_point()]
    return [kind for kind in (floats, integers) if kind]


def find_checkpoint(source, folder, accelerator, say, overwrite=False):
    """(path, tensors, state) of the checkpoint to resume from, or None; on all processes the same.

    source: "auto" for the newest valid one of this run, or a path. Raises UserError where the run
    had a checkpoint and has none now, unless it may be overwritten. The main process reads the
    checkpoint and sends it to the others, which may be on machines without its disk.
    """
    checkpoint = None

    def read():
        nonlocal checkpoint
        if source == "auto":
            if not is_cleared(folder):
                checkpoint = newest_valid(folder / "checkpoints", say)
                if checkpoint is None and not overwrite:
                    check_nothing_lost(folder)
            return
        try:
            checkpoint = Path(source), *load_checkpoint(source)
        except Damaged as damage:
            raise UserError(f"--resume_from_checkpoint {source}: {damage}") from None

    on_main(accelerator, read)
    return checkpoint if accelerator.num_processes == 1 else _share(checkpoint, accelerator)


def check_state(path, state):
    """A checkpoint's state.json, with defaults for what older versions did not write.

    Raises UserError where an entry is missing or can't be used, and where augmentation is drawn by
    another rule.
    """
    if isinstance(state, dict):
        defaults = {"nonfinite": [0, 0], "threads": [], "unscored": None, "draws": "by batch"}
        state = defaults | {"energy": {}, "evaluation_seconds": 0.0} | state
    sums = len(SUMS) + 1
    checks = {
        "step": lambda v: type(v) is int and v >= 0,
        "identity": lambda v: isinstance(v, dict),
        "draws": lambda v: isinstance(v, str),
        "interval": lambda v: len(v) == sums and all(isinstance(x, float) for x in v),
        "epoch": lambda v: len(v) == sums and all(isinstance(x, float) for x in v),
        "nonfinite": lambda v: len(v) == 2 and all(type(n) is int and n >= 0 for n in v),
        "threads": lambda v: all(type(n) is int and 0 < n <= 2**16 for n in v),
        "scores": lambda v: isinstance(v, dict),
        "unscored": lambda v: v is None or list(v) == UNSCORED,
        "best": lambda v: v is None or isinstance(v["scores"], dict),
        "seconds": lambda v: isinstance(v, float) and v >= 0,
        "evaluation_seconds": lambda v: isinstance(v, float) and v >= 0,
        "energy": lambda v: isinstance(v, dict) and all(isinstance(x, float) for x in v.values()),
    }
    for name, fits in checks.items():
        try:
            is_valid = fits(state[name])
        except (KeyError, TypeError):
            is_valid = False
        if not is_valid:
            raise UserError(f"{path}/state.json has no usable {name}")
    _check_draws(path, state["draws"])
    return state


def _check_draws(path, rule):
    """Raise UserError, with the commit that continues it, for a checkpoint of another rule."""
    if rule == DRAWS:
        return
    hint = "a newer version may continue"
    if rule in CONTINUED_BY:
        hint = f"commit {CONTINUED_BY[rule]} is the last that continues"
    raise UserError(
        f"{path} was written with augmentation drawn {rule}, this version draws it {DRAWS}: {hint} "
        "it, or give another --run_name to start anew"
    )


def check_identity(path, old, new, flag_names):
    """Raise UserError, with the first difference, unless a checkpoint is of these very flags.

    old, new: the identities of the checkpoint and of this run. flag_names: of those that are not at
    their defaults; others may be missing in the checkpoint of an older version.
    """
    if "store" in new:  # older versions had no other store
        old = {"store": "decoded", **old}
    for name in [*new, *(old.keys() - new.keys())]:
        if name in named("operational") or (name not in old and name not in flag_names):
            continue  # older checkpoints hold gradient_accumulation_steps, not operational then
        if name == "dataset" and "content" in new and old.get("content") == new["content"]:
            continue  # the same images, in another folder
        if name == "dataset" and old[name] != new[name] and old.get("content") and "content" in new:
            raise UserError(
                f"{path} was written with dataset {old[name]}, and {new[name]} has other images: "
                f"{content_changes(old['content'], new['content'])}. {BRING_BACK}"
            )
        if name == "content" and old[name] != new.get(name):
            changes = content_changes(old["content"], new.get("content") or {})
            raise UserError(f"{path} was written with other images: {changes}. {BRING_BACK}")
        if old.get(name) != new.get(name) and name == "data_sha256":
            raise UserError(f"{path} was written with other images or labels{_sizes(old, new)}")
        if name == "store" and old[name] != new[name]:
            raise UserError(f"{path} was written with other pixels: {_store(old[name], new[name])}")
        if old.get(name) != new.get(name):
            raise UserError(
                f"{path} was written with {name} {old.get(name)}, this command has "
                f"{new.get(name)}: give the same flags to continue it, or another --run_name to "
                "start anew"
            )


def _sizes(old, new):
    """How many images of which split there were and are, where that differs."""
    old_sizes, new_sizes = old.get("split_sizes") or {}, new.get("split_sizes") or {}
    differences = [
        f"{split} had {old_sizes.get(split, 0):,}, now {new_sizes.get(split, 0):,}"
        for split in {**old_sizes, **new_sizes}
        if old_sizes.get(split) != new_sizes.get(split)
    ]
    text = f": {', '.join(differences)}" if differences else ", though as many"
    return f"{text}. {BRING_BACK}"


def _store(old, new):
    """How the store of pixels differs."""
    kinds = ["decoded" if store == "decoded" else "packed" for store in (old, new)]
    if kinds[0] != kinds[1]:
        return f"the {kinds[0]} ones, these are {kinds[1]}; --pixels {kinds[0]} continues it"
    if old.get("decoder") != new.get("decoder"):
        return (
            f"{old.get('decoder')} decoded them, here it is {new.get('decoder')}; install that "
            "version to continue it, or give another --run_name to start anew"
        )
    if old.get("shares") != new.get("shares"):
        return (
            f"{old.get('shares') or 'all'} shares of the train images, here "
            f"{new.get('shares') or 'all'}; give --shard_store and as many machines to continue it"
        )
    return (
        "its packed store was made by other versions, or for larger crops; give another --run_name "
        "to start anew"
    )


def content_changes(old_content, new_content):
    """How the images differ from those of a checkpoint or result, split by split.

    The contents: {split: [images, hash]}, as `Data.content`.
    """
    differences = []
    for split in [*old_content, *(new_content.keys() - old_content.keys())]:
        if old_content.get(split) == new_content.get(split):
            continue
        counts = (content.get(split, [0, ""])[0] for content in (old_content, new_content))
        old_count, new_count = counts
        difference = "as many images, but not the same ones, or with other labels"
        if new_count != old_count:
            direction = "more" if new_count > old_count else "fewer"
            difference = f"{abs(new_count - old_count):,} {direction} images"
        differences.append(f"split '{split}' has {difference}")
    return "; ".join(differences)


def _share(checkpoint, accelerator):
    """The main process's checkpoint, or None, on all processes."""
    path, tensors, state = checkpoint or (None, {}, None)
    shapes = {f: {n: (t.shape, t.dtype) for n, t in g.items()} for f, g in tensors.items()}
    path, shapes, state = broadcast_object_list([path, shapes, state])
    copies = {}
    for file, group in shapes.items():
        copies[file] = {}
        for name, (shape, dtype) in group.items():
            tensor = tensors[file][name] if tensors else torch.empty(shape, dtype=dtype)
            copies[file][name] = broadcast(tensor.to(accelerator.device)).cpu()
    return path and (path, copies, state)


def _optimizer_state(path, moments, model, optimizer):
    """The optimizer's state_dict made of `moments`, each in its parameter's memory format."""
    parameters = dict(model.named_parameters())
    state = {}
    for name, value in moments.items():
        parameter, _, key = name.rpartition("//")
        if parameter not in parameters:
            raise UserError(f"{path}/optimizer.safetensors has {parameter}, the model has not")
        like = parameters[parameter]
        if value.ndim:
            _check(path, "optimizer", {name: value}, {name: like})
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(id(like), {})[key] = value
    packed = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed["state"] = {i: state[id(p)] for i, p in enumerate(order) if id(p) in state}
    return packed


def _check(path, file, tensors, expected):
    strays = sorted(tensors.keys() ^ expected.keys())
    strays = strays or [
        k for k, v in expected.items() if (tensors[k].shape, tensors[k].dtype) != (v.shape, v.dtype)
    ]
    if strays:
        rest = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        raise UserError(
            f"{path}/{file}.safetensors does not fit this model in {', '.join(strays[:3])}{rest}"
        )

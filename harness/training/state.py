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

# The last commit that continues a checkpoint of an older rule of drawing. "by batch", by which
# every process drew for the whole batch, is what checkpoints had before they named a rule
CONTINUED_BY = {"by batch": "b75d8de"}
UNSCORED = ["epoch", "loss", "mixed_acc", "steps", "images_per_second"]  # of an epoch's end
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
    """Put what `gather_tensors` gave back; raises UserError before anything is touched.

    moments: how many tensors the optimizer had, where that is known.
    """
    if moments not in (None, len(tensors["optimizer"])):
        raise UserError(
            f"{path}/optimizer.safetensors has {len(tensors['optimizer'])} tensors, there were "
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
    """The values of the floats and of the whole numbers among `tensors`, a vector each."""
    return [torch.cat([t.detach().reshape(-1) for t in kind]) for kind in _kinds(tensors)]


@torch.no_grad()
def write_back(tensors, vector):
    """Give the tensors the values that follow each other in `vector`, in one call for all."""
    pieces = vector.split([t.numel() for t in tensors])
    if tensors:
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)])


@torch.no_grad()
def put_back(tensors, before, where):
    """Give the tensors the values that `copy_by_kind` took, if `where`, a boolean on the device.

    By choosing, not by arithmetic: NaN goes. And without the host's knowledge of `where`.
    """
    for kind, old, now in zip(_kinds(tensors), before, copy_by_kind(tensors), strict=True):
        pieces = torch.where(where, old, now).split([t.numel() for t in kind])
        torch._foreach_copy_(kind, [p.view(t.shape) for p, t in zip(pieces, kind, strict=True)])


def _kinds(tensors):
    floats = [t for t in tensors if t.is_floating_point()]
    others = [t for t in tensors if not t.is_floating_point()]
    return [kind for kind in (floats, others) if kind]


def find_checkpoint(asked, folder, accelerator, say, overwrite=False):
    """(path, tensors, state) of the checkpoint to resume from, or None; the same everywhere.

    asked: "auto" for the newest valid one of this run, or a path. Raises UserError where the run
    had one and has none now, unless it may be overwritten. The main process reads it and
    hands it to the others, which may be on machines that don't see its disk.
    """
    found = None

    def read():
        nonlocal found
        if asked == "auto":
            if not is_cleared(folder):
                found = newest_valid(folder / "checkpoints", say)
                if found is None and not overwrite:
                    check_nothing_lost(folder)
            return
        try:
            found = Path(asked), *load_checkpoint(asked)
        except Damaged as damage:
            raise UserError(f"--resume_from_checkpoint {asked}: {damage}") from None

    on_main(accelerator, read)
    return found if accelerator.num_processes == 1 else _share(found, accelerator)


def check_state(path, saved):
    """A checkpoint's state.json, with what an older version did not write.

    Raises UserError unless it says where a run is, and for another rule of drawing.
    """
    if isinstance(saved, dict):
        older = {"nonfinite": [0, 0], "threads": [], "unscored": None, "draws": "by batch"}
        saved = older | {"energy": {}, "evaluation_seconds": 0.0} | saved
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
            known = fits(saved[name])
        except (KeyError, TypeError):
            known = False
        if not known:
            raise UserError(f"{path}/state.json has no usable {name}")
    _check_draws(path, saved["draws"])
    return saved


def _check_draws(path, rule):
    """Raise UserError, with what continues it, unless a checkpoint is of this rule of drawing."""
    if rule == DRAWS:
        return
    who = "a newer version may continue"
    if rule in CONTINUED_BY:
        who = f"commit {CONTINUED_BY[rule]} is the last that continues"
    raise UserError(
        f"{path} was written with augmentation drawn {rule}, this version draws it {DRAWS}: {who} "
        "it, or give another --run_name to start anew"
    )


def check_identity(path, saved, ours, given):
    """Raise UserError, naming the first difference, unless a checkpoint is of these very flags.

    given: the flags that are not at their defaults; a checkpoint of an older version may not know
    the others.
    """
    if "store" in ours:  # there was only this one before
        saved = {"store": "decoded", **saved}
    for name in [*ours, *(saved.keys() - ours.keys())]:
        if name in named("operational") or (name not in saved and name not in given):
            continue  # gradient_accumulation_steps was none of these once
        if name == "dataset" and "content" in ours and saved.get("content") == ours["content"]:
            continue  # the same images, in another place
        if name == "content" and saved[name] != ours.get(name):
            raise UserError(f"{path} was written with other images: {_changes(saved, ours)}")
        if saved.get(name) != ours.get(name) and name == "data_sha256":
            raise UserError(f"{path} was written with other images or labels{_sizes(saved, ours)}")
        if name == "store" and saved[name] != ours[name]:
            raise UserError(
                f"{path} was written with other pixels: {_store(saved[name], ours[name])}"
            )
        if saved.get(name) != ours.get(name):
            raise UserError(
                f"{path} was written with {name} {saved.get(name)}, this command has "
                f"{ours.get(name)}: give the same flags to continue it, or another --run_name to "
                "start anew"
            )


def _sizes(saved, ours):
    """How many images of which split there were and are, where that differs."""
    before, now = saved.get("split_sizes") or {}, ours.get("split_sizes") or {}
    words = [
        f"{split} had {before.get(split, 0):,}, now {now.get(split, 0):,}"
        for split in {**before, **now}
        if before.get(split) != now.get(split)
    ]
    why = f": {', '.join(words)}" if words else ", though as many"
    return f"{why}. Bring them back to continue this run, or give another --run_name to start anew"


def _store(before, now):
    """Which store of pixels there was and is."""
    kinds = ["decoded" if store == "decoded" else "packed" for store in (before, now)]
    if kinds[0] != kinds[1]:
        return f"the {kinds[0]} ones, these are {kinds[1]}; --pixels {kinds[0]} continues it"
    if before.get("decoder") != now.get("decoder"):
        return (
            f"{before.get('decoder')} decoded them, here it is {now.get('decoder')}; install that "
            "version to continue it, or give another --run_name to start anew"
        )
    if before.get("shares") != now.get("shares"):
        return (
            f"{before.get('shares') or 'all'} shares of the train images, here "
            f"{now.get('shares') or 'all'}; give --shard_store and as many machines to continue it"
        )
    return (
        "its packed store was made by other versions, or for larger crops; give another --run_name "
        "to start anew"
    )


def _changes(saved, ours):
    """What of the images is another than a checkpoint says, a split at a time."""
    before, now = saved["content"], ours.get("content") or {}
    words = []
    for split in [*before, *(now.keys() - before.keys())]:
        if before.get(split) == now.get(split):
            continue
        had, have = (content.get(split, [0, ""])[0] for content in (before, now))
        difference = "as many files, but other names, sizes or labels"
        if have != had:
            difference = f"{abs(have - had):,} {'more' if have > had else 'fewer'} files"
        words.append(f"split '{split}' has {difference}")
    return (
        "; ".join(words)
        + ". Bring them back to continue this run, or give another --run_name to start anew"
    )


def _share(found, accelerator):
    path, tensors, state = found or (None, {}, None)
    shapes = {f: {n: (t.shape, t.dtype) for n, t in g.items()} for f, g in tensors.items()}
    path, shapes, state = broadcast_object_list([path, shapes, state])
    shared = {}
    for file, group in shapes.items():
        shared[file] = {}
        for name, (shape, dtype) in group.items():
            mine = tensors[file][name] if tensors else torch.empty(shape, dtype=dtype)
            shared[file][name] = broadcast(mine.to(accelerator.device)).cpu()
    return path and (path, shared, state)


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


def _check(path, file, got, expected):
    strays = sorted(got.keys() ^ expected.keys())
    strays = strays or [
        k for k, v in expected.items() if (got[k].shape, got[k].dtype) != (v.shape, v.dtype)
    ]
    if strays:
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        raise UserError(
            f"{path}/{file}.safetensors does not fit this model in {', '.join(strays[:3])}{more}"
        )

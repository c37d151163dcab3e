"""Weights: what `--weights` names, read without unpickling, and loaded into a model.

Their source also tells how images have to be prepared, and which classes their head has.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from harness.data.preprocessing import Preprocessing, preprocessing_of
from harness.errors import UserError, nearest, reason_of
from harness.files import DIGEST, written_digest
from harness.hub import PREFIX, model_file, reachable_or_cached
from harness.models.build import Family, family_of, skeleton
from harness.models.config import DATA_FLAGS, read_config
from harness.models.heads import heads
from harness.models.names import Network, find_model
from harness.models.reading import AVERAGED, RAW, read_weights, under_prefix, unreadable

# Names in torchvision's older weight files -> names in its models now.
OLD_KEYS = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
# What wrappers of a network add to the names of its state
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
MOST_LEVELS = 3  # of a prefix in front of a network's names in a state
NETWORK_SHARE = 0.9  # of the names under the best prefix: one with so many is a network, too
USUAL_SIZES = (224, 256, 288, 384, 448, 512)  # px a side, of published weights
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that our googlenet and inception lack


class Pretrained(NamedTuple):
    """Weights and facts about them; None for what is unknown."""

    state: dict[str, torch.Tensor] | None = None
    label: str = "none"
    stem: str | None = None  # "small" or "standard"
    classes: list[str] | None = None  # in the order of the ids
    preprocessing: Preprocessing | None = None
    recipes: tuple = ()  # of the images they were trained on, see `recipes_of`
    origin: str | None = None  # where the preprocessing comes from, in words
    description: str = ""  # which part of its file they are
    note: str = ""  # what is odd about a run's files
    network: Network | None = None  # which they are for


def recipes_of(config) -> list[dict]:
    """From config.json: which images a network was trained on, and the networks it came from.

    Each has the flags that choose the images, "dataset", as the flag gave it, and "source", where
    it was. For weights of unknown origin it is {"unknown": their name}.
    """
    flags = config.get("flags") or {}
    recipe = {name: flags[name] for name in DATA_FLAGS if flags.get(name) is not None}
    recipe["dataset"] = str(config.get("dataset") or "")
    recipe["source"] = str((config.get("data") or {}).get("source") or "")
    recipe["mirrored"] = flags.get("augment") != "none" and flags.get("flip_prob") != 0
    return [recipe, *(config.get("ancestors") or [])]


# -- states --------------------------------------------------------------------------------------


def clean_state_dict(model) -> dict[str, torch.Tensor]:
    """The state by the plain model's names (no compile or DDP prefix), contiguous for safetensors.

    safetensors refuses channels_last tensors, so those are copied; the others share memory.
    """
    return {name: tensor.contiguous() for name, tensor in plain_state_dict(model).items()}


def plain_state_dict(model) -> dict[str, torch.Tensor]:
    """The state by the plain model's names, sharing the model's memory."""
    return {_plain_key(name): tensor.detach() for name, tensor in model.state_dict().items()}


def load_state(model, state, source="weights"):
    """Copy `state` into `model`, all of it or nothing; either may carry wrappers' prefixes.

    Only BatchNorm's batch counters may be missing, as they are from torchvision's older files.
    Raises UserError that names `source` and the missing, unexpected and mismatched keys.
    """
    model_state = model.state_dict()  # with the version numbers that torch's modules read
    names = {_plain_key(key): key for key in model_state}
    state = {_current_key(_plain_key(key), names): value for key, value in state.items()}
    missing_keys = [k for k in names.keys() - state if not k.endswith("num_batches_tracked")]
    other_shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(model_state[names[k]].shape)}"
        for k in names.keys() & state
        if state[k].shape != model_state[names[k]].shape
    ]
    faults = {
        "missing": missing_keys,
        "unexpected": state.keys() - names,
        "another shape": other_shapes,
    }
    if any(faults.values()):
        lists = "; ".join(
            f"{fault}: {_first_names(keys)}" for fault, keys in faults.items() if keys
        )
        raise UserError(f"{source} does not fit {type(model).__name__}: {lists}")
    for key in sorted(names.keys() & state):
        if reason := _not_a_weight(state[key], model_state[names[key]]):
            raise UserError(f"{source} can't be weights: {key} {reason}")
    for key in names.keys() & state:
        model_state[names[key]] = state[key]
    model.load_state_dict(model_state)


def result_note(folder, config) -> str:
    """What is odd about the files of a run's result, or "". Raises UserError for damaged ones."""
    file = Path(folder) / "model.safetensors"
    try:
        digest = written_digest(file, file.read_bytes())
    except (ValueError, AttributeError, RecursionError) as error:
        raise unreadable(file, error) from None
    if digest is None:
        return "not checked: written without a hash, by an earlier version or another program"
    if config.get(DIGEST) not in (None, digest):
        return "its config.json is of an older result of the run, which was killed while writing"
    return ""


def _not_a_weight(value, target):
    """Why a tensor can't take the place of another one of its shape, or None."""
    if target.is_meta:  # a network without values: only shapes count
        return None
    if value.layout is not torch.strided:
        return "is stored sparsely: .to_dense() it before it is saved"
    if value.is_meta:
        return "has a shape and no values"
    if not target.is_floating_point():
        return None
    kind = str(value.dtype).removeprefix("torch.")
    if not value.is_floating_point():
        return f"holds {kind} values"
    try:
        converted = value.to(target.dtype)
    except NotImplementedError:  # torch stores float4 and computes nothing of it
        return f"holds {kind} values"
    if not converted.isfinite().all() and target.isfinite().all():
        large = f" as {str(target.dtype).removeprefix('torch.')}" if value.isfinite().all() else ""
        return f"holds values that are not finite{large}"
    return None


class Loaded(NamedTuple):
    """What `load_pretrained` did, in words, and whether the model kept its own heads."""

    text: str
    head_is_new: bool


def load_pretrained(model, pretrained, classes=None, by_order=False) -> Loaded:
    """Load weights of `find_weights` into the model.

    classes: names of the model's classes in the order of the ids. The model keeps its own head
    where the loaded one is of another shape or kind, or where the classes of both are known and
    differ; the text then says so. Position embeddings of torchvision's vit are resized to the
    model's, and states of timm's networks are converted as timm would. Any other mismatch is a
    UserError that lists the keys. by_order: the n-th tensor of the state becomes the model's n-th,
    whatever its name, if all shapes are the same.
    """
    if pretrained.state is None:
        if by_order:
            raise UserError("--weights_by_order: there are no --weights to give out")
        return Loaded("no pretrained weights", True)
    state = {_plain_key(key): value for key, value in pretrained.state.items()}
    message = f"weights {pretrained.label}"
    message += f", {pretrained.description}" if pretrained.description else ""
    if by_order:
        state = _in_order(model, state, pretrained.label)
        message += "; loaded by order: shapes were checked, names were not"
    state, conversion_note = _as_timm_would(model, state)
    names = [name for name, _ in heads(model)]
    prefixes = tuple(f"{name}." for name in names)
    file_head, model_head = (
        {key: value for key, value in keys.items() if key.startswith(prefixes)}
        for keys in (state, clean_state_dict(model))
    )
    if head_reason := _head_mismatch(file_head, model_head, pretrained.classes, classes):
        state = {key: value for key, value in state.items() if key not in file_head} | model_head
        message += f"; head {' and '.join(names)} is new: {head_reason}"
    state, resize_note = _resize_positions(model, state)
    try:
        load_state(model, state, pretrained.label)
    except UserError as error:
        if size := _required_size(model, state, pretrained):
            error = UserError(f"{error}. These weights need --image_size {size}")
        if pretrained.description:
            error = UserError(f"{error}. Read from the file: {pretrained.description}")
        names_differ = state.keys() != clean_state_dict(model).keys()
        if by_order or not names_differ or _in_order(model, pretrained.state) is None:
            raise error from None
        raise UserError(
            f"{error}. All shapes match in order under other names: --weights_by_order loads them "
            "so, and checks nothing but shapes"
        ) from None
    note = f"; {pretrained.note}" if pretrained.note else ""
    return Loaded(message + conversion_note + resize_note + note, bool(head_reason))


def _head_mismatch(file_head, model_head, file_classes, model_classes):
    """Why the model keeps its own head, or None. file_head, model_head: states of the heads."""
    if not file_head:
        return "none there"
    file_outputs, model_outputs = (
        # The last matrix gives the logits; keys of one head differ in one digit at most
        max(((k, len(v)) for k, v in head.items() if v.ndim > 1), default=(None, None))[1]
        for head in (file_head, model_head)
    )
    if file_outputs and file_outputs != model_outputs:
        return f"{file_outputs} classes there, {model_outputs} here"
    if {k: v.shape for k, v in file_head.items()} != {k: v.shape for k, v in model_head.items()}:
        return "another kind there"
    comparable = file_classes is not None and model_classes is not None
    if (
        comparable
        and len(file_classes) == len(model_classes)
        and list(model_classes) != file_classes
    ):
        return "other classes"
    return None


def _in_order(model, state, source=None):
    """The tensors of a state under the model's names, given out in order.

    All shapes have to be the model's, except for the number of classes. Otherwise returns None or,
    given a `source`, raises a UserError that names it.
    """
    model_state = {_plain_key(name): tensor for name, tensor in model.state_dict().items()}
    prefixes = tuple(f"{name}." for name, _ in heads(model))
    no_counters = {k: v for k, v in model_state.items() if not k.endswith("num_batches_tracked")}
    reason = f"{len(state)} tensors there, {len(model_state)} here"
    for names in (model_state, no_counters):
        if len(names) != len(state):
            continue
        misfits = [
            (key, name)
            for (key, value), (name, target) in zip(state.items(), names.items(), strict=True)
            if value.shape != target.shape
            and not (name.startswith(prefixes) and value.shape[1:] == target.shape[1:])
        ]
        if not misfits:
            return dict(zip(names, state.values(), strict=True))
        key, name = misfits[0]
        reason = f"{key} {tuple(state[key].shape)} would be {name} {tuple(names[name].shape)}"
    if source:
        raise UserError(f"--weights_by_order: {source} has other shapes: {reason}")
    return None


def _as_timm_would(model, state):
    """The state as timm's own loader converts it for the model, and a note of what changed.

    Position embeddings for another image size are resized, names of the original code translated.
    """
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    model_shapes = {key: value.shape for key, value in model.state_dict().items()}
    prefixes = tuple(f"{name}." for name, _ in heads(model))
    file_shapes = {key: value.shape for key, value in state.items() if not key.startswith(prefixes)}
    fits = file_shapes == {
        key: shape for key, shape in model_shapes.items() if not key.startswith(prefixes)
    }
    if fits or convert is None or not module.__name__.startswith("timm."):
        return state, ""
    try:
        converted = convert(dict(state), model)
    except Exception:  # the state is of another network: `load_state` lists its keys
        return state, ""
    resized = [
        key for key in converted if key in file_shapes and converted[key].shape != file_shapes[key]
    ]
    note = f"; resized as timm does: {_first_names(resized)}" if resized else ""
    if converted.keys() - state.keys() - {key for key in converted if key.startswith(prefixes)}:
        note += "; names translated as timm does"
    return converted, note


def _required_size(model, state, pretrained):
    """The image size at which the model's network has the shapes of a state, or None.

    Only for timm's networks whose shapes depend on the size and that timm can't convert.
    """
    network = pretrained.network
    model_shapes = {key: value.shape for key, value in clean_state_dict(model).items()}
    if network is None or network.library != "timm" or model_shapes.keys() != state.keys():
        return None
    file_shapes = {key: value.shape for key, value in state.items()}
    changed = [key for key in model_shapes if model_shapes[key] != file_shapes[key]]
    sizes = [pretrained.preprocessing.size] if pretrained.preprocessing else []
    for size in dict.fromkeys((*sizes, *USUAL_SIZES)):
        try:
            shapes = skeleton(network, size).state_dict()
        except (RuntimeError, ValueError, TypeError, AssertionError):  # not at this size
            continue
        if changed and all(
            key in shapes and shapes[key].shape == file_shapes[key] for key in changed
        ):
            return size
    return None


def _resize_positions(model, state):
    """The state with a vit's position embedding in the model's size, and a note if resized."""
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    positions = state.get("encoder.pos_embedding")
    if not isinstance(model, VisionTransformer) or positions is None:
        return state, ""
    patches = positions.shape[1] - 1 if positions.ndim == 3 else 0  # one is the class token's
    old, new = math.isqrt(max(patches, 0)), model.image_size // model.patch_size
    if old in (0, new) or old**2 != patches:
        return state, ""
    state = interpolate_embeddings(model.image_size, model.patch_size, dict(state))
    return state, f"; position embedding resized from {old}×{old} to {new}×{new}"


# -- where they come from ------------------------------------------------------------------------


def find_weights(spec, name, stem="auto") -> Pretrained:
    """What `--weights` names, for the model `name`.

    spec: "none", "default", the name of weights that torchvision publishes or the tag of timm's,
    hf-hub:owner/name, a run folder, or a file (FILE:KEY for one state of several). torchvision's
    and timm's own download and caches are used; a filled cache needs no network. All facts are
    known for published weights, those in config.json for a run folder (timm's, too), and the stem,
    from the shapes, for other files. stem: `--stem`, which wins where the weights fit it. name: see
    harness.models.names.find_model.

    Raises UserError for weights that can't be read or downloaded, for a folder of another
    architecture and for weights that have another stem than `stem`.
    """
    if spec == "none":
        return Pretrained()
    network = find_model(name)
    if spec == "default" and network.hub:
        spec = network.hub
    is_file = Path(spec).exists() or Path(spec.rpartition(":")[0]).is_file()
    is_file = is_file or Path(spec).suffix or "/" in spec
    if spec.startswith(PREFIX):
        pretrained = _on_hub(spec, network)
    elif spec != "default" and is_file:
        pretrained = _in_file(spec, network)
    elif network.library == "timm":
        pretrained = _published_by_timm(spec, network)
    elif network.library == "torchvision":
        pretrained = _published(spec, network.name)
    else:
        raise UserError(f"--weights {spec}: {name} takes a run folder or a file")
    state = {_plain_key(key): value for key, value in pretrained.state.items()}
    if is_file or spec.startswith(PREFIX):
        state, note = _network_part(state, network, pretrained.label)
        pretrained = pretrained._replace(
            description=", ".join(filter(None, (pretrained.description, note)))
        )
    state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}
    pretrained = pretrained._replace(state=state)
    family = family_of(network.name) if network.library == "torchvision" else Family()
    return pretrained._replace(stem=_stem(pretrained, family, stem), network=network)


def _network_part(state, network, source):
    """(the entries of a state that are the network's, a note about the others).

    The network's names may have a prefix, such as Lightning's `model.`, beside which there may be
    the weights of a loss or averaged weights. The prefix with most of the network's names is
    chosen; of several equally good ones that of averaged weights, else one that trainers use, see
    harness.models.reading.

    Raises UserError where there are several networks and no name tells which one is meant.
    """
    names = skeleton(network).state_dict().keys()
    counts = Counter(
        prefix
        for key in state
        for prefix in _prefixes(key)
        if (key[len(prefix) :].lstrip(".") if prefix else key) in names
    )
    largest = max(counts.values(), default=0)
    candidates = [prefix for prefix, count in counts.items() if count >= NETWORK_SHARE * largest]
    if largest and "" not in candidates:
        if len(candidates) > 1:
            levels = {prefix: set(prefix.split(".")) for prefix in candidates}
            usual_prefixes = [
                p for name in (*AVERAGED, *RAW) for p in candidates if name in levels[p]
            ]
            if not usual_prefixes:
                raise UserError(
                    f"{source} holds several networks: choose one, {source}:KEY with "
                    f"{', '.join(sorted(candidates))}"
                )
            candidates = usual_prefixes
        chosen_prefix = candidates[0]
        unused = [key for key in state if not key.startswith(f"{chosen_prefix}.")]
        note = f"the entries under {chosen_prefix}" + (
            f"; not used: {_first_names(unused)}" if unused else ""
        )
        return under_prefix(state, chosen_prefix), note if unused else ""
    # A single number beside the weights, such as a count of steps, is not the network's
    return {k: v for k, v in state.items() if k in names or "." in k or v.ndim}, ""


def _prefixes(key):
    """The prefixes of a key, from none to MOST_LEVELS names."""
    levels = key.split(".")
    return [".".join(levels[:n]) for n in range(min(len(levels), MOST_LEVELS + 1))]


def _stem(pretrained, family, stem):
    """The stem to build for these weights: their own, or `stem` where they fit both."""
    kernel = pretrained.state.get(f"{family.stem_conv}.weight")
    file_stem = None
    if kernel is not None and family.stem_kernel != 3:
        file_stem = "small" if kernel.shape[2:] == (3, 3) else "standard"
    if stem == "auto":
        return file_stem or pretrained.stem or "standard"
    if file_stem not in (None, stem):
        raise UserError(
            f"--stem {stem}: {pretrained.label} has the {file_stem} stem (leave --stem out)"
        )
    return stem


def _in_file(spec, network):
    """The weights in a file or a folder, with the facts of a config.json beside them."""
    path, file = Path(spec), None
    if path.is_dir() or path.name == "model.safetensors":
        file = (path if path.is_dir() else path.parent) / "config.json"
    return _pretrained_of(spec, spec, file, network)


def _on_hub(spec, network):
    """The weights of a model on the Hub."""
    file = model_file(spec, "config.json")
    path = model_file(spec, "model.safetensors", "pytorch_model.bin")
    return _pretrained_of(spec, path, file, network)


def _pretrained_of(spec, path, file, network):
    """The Pretrained of the weights at `path` and of `file`, their config.json or None."""
    config = read_config(file) if file else {}
    name, library = config.get("architecture"), config.get("library")
    if name not in (None, network.name):
        raise UserError(f"{spec} holds a {name}: add --model {name}")
    if name and library not in (None, network.library):
        raise UserError(f"{spec} holds {library}'s {name}: add --model {library}/{name}")
    weights = read_weights(path)
    classes, stem = config.get("label_names"), config.get("stem")
    cfg, origin = config.get("pretrained_cfg"), str(file)
    if cfg is None and network.library == "timm":
        cfg, origin = timm_cfg(network), f"timm's cfg of {network.name}, whose weights they may be"
    preprocessing = None if cfg is None else preprocessing_of(cfg, origin)
    return Pretrained(
        weights.state,
        spec,
        stem,
        [str(label) for label in classes] if isinstance(classes, list) else None,
        preprocessing,
        tuple(recipes_of(config) if config.get("flags") else [{"unknown": str(spec)}]),
        (origin + _other_cut(cfg)) if preprocessing else None,
        weights.description,
        result_note(Path(file).parent, config) if config.get("flags") else "",
    )


def timm_cfg(network, tag=None):
    """timm's pretrained_cfg of a network's weights, as a dict."""
    import timm

    tag = tag or network.tag
    return timm.get_pretrained_cfg(f"{network.name}.{tag}" if tag else network.name).to_dict()


def _other_cut(cfg):
    """A note where timm would crop the images in another way than we do."""
    mode = cfg.get("crop_mode")
    return f" (crop_mode {mode} there, center here)" if mode not in (None, "center") else ""


def _published_by_timm(spec, network):
    """The weights that timm publishes: its own download, from the Hub's cache or the network."""
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset

    tag = None if spec == "default" else spec
    name = f"{network.name}.{tag or network.tag}" if tag or network.tag else network.name
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{network.name}.*")]
    if not tags or (tag and tag not in tags):
        hint = nearest(tag, tags) or (f": it has {', '.join(tags)}" if tags else "")
        raise UserError(
            f"timm's {network.name} has no weights {tag or ''}{hint} (and no file is called so)"
        )
    cfg = timm_cfg(network, tag)
    try:
        with reachable_or_cached():  # safetensors first; others are read with weights_only
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # no network, no space, a damaged or hostile file in the cache
        raise UserError(
            f"timm's {name} could not be loaded ({reason_of(error)}); where there is a network, "
            f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\" fetches it"
        ) from None
    labels = cfg.get("label_names")
    if labels is None and (subset := infer_imagenet_subset(cfg)):
        imagenet = ImageNetInfo(subset)
        labels = [imagenet.index_to_description(k) for k in range(imagenet.num_classes())]
    return Pretrained(
        model.state_dict(),
        f"timm/{network.name}.{cfg['tag']}",
        "standard",
        list(labels) if labels else None,
        preprocessing_of(cfg, f"timm's {name}"),
        origin=f"timm's cfg of {network.name}.{cfg['tag']}" + _other_cut(cfg),
    )


def _published(spec, name):
    """The weights that torchvision publishes under a name, from its cache or the network."""
    import torchvision

    weights_enum = torchvision.models.get_model_weights(name)
    if spec != "default" and spec not in weights_enum.__members__:
        hint = nearest(spec, weights_enum.__members__)
        raise UserError(f"{name} has no weights {spec}{hint} (and no file is called so)")
    weights = weights_enum.DEFAULT if spec == "default" else weights_enum[spec]
    if not weights.meta.get("categories"):  # vgg16's IMAGENET1K_FEATURES: its classifier is NaN
        complete = ", ".join(w.name for w in weights_enum if w.meta.get("categories"))
        raise UserError(f"{weights} has convolutions only, no classifier: take {complete}")
    try:  # torch.hub would unpickle a cached file freely, so say weights_only here
        state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, no space, a damaged or hostile file in the cache
        cache_file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise UserError(
            f"{weights} could not be loaded ({reason_of(error)}): they belong at {cache_file}; "
            f"where there is a network, python -c 'from torchvision.models import *; "
            f"{weights}.get_state_dict(check_hash=True)' puts them there"
        ) from None
    transforms = weights.transforms()
    mean, std = family_of(name).colours or (transforms.mean, transforms.std)
    size, resize = transforms.crop_size[0], transforms.resize_size[0]
    return Pretrained(
        state,
        str(weights),
        "standard",
        list(weights.meta["categories"]),
        Preprocessing(size, size / resize, transforms.interpolation.value, tuple(mean), tuple(std)),
        origin=f"torchvision's transforms of {weights}",
    )


def _plain_key(key):
    """A state key without the names that torch.compile, FSDP, checkpointing and DDP add."""
    for name in WRAPPERS:
        key = key.replace(name, "")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _current_key(key, names):
    """The key, or its current name where it is not in `names`."""
    for old, new in OLD_KEYS:
        key = key if key in names else old.sub(new, key)
    return key


def _first_names(keys):
    """The first three keys, and how many more there are."""
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

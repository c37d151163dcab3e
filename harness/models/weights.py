"""Weights: found by what `--weights` says, read without unpickling, loaded into a model.

Where they come from also says how they want their images, and which classes their head knows.
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
# What wrappers put into the names of what they wrap
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
MOST_WORDS = 3  # of a prefix that names a network in a state
WHOLE = 0.9  # of the most names of the network that are under any prefix: it is one as well
USUAL_SIZES = (224, 256, 288, 384, 448, 512)  # px a side that published weights are for
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that we build googlenet, inception without


class Pretrained(NamedTuple):
    """Weights, and what is known of them; None where it is not."""

    state: dict[str, torch.Tensor] | None = None
    label: str = "none"
    architecture: str | None = None
    stem: str | None = None  # "small" or "standard"
    classes: list[str] | None = None  # in the order of the ids
    preprocessing: Preprocessing | None = None
    recipes: tuple = ()  # what they were trained on, see `recipes_of`
    origin: str | None = None  # where the preprocessing is from, in words
    words: str = ""  # what was taken of a file that holds more
    note: str = ""  # what is odd about a run's files
    network: Network | None = None  # that they were looked for


def recipes_of(config) -> list[dict]:
    """From config.json: which images a network was trained on, and the networks it came from.

    Each is the flags that choose the images, with "dataset" as it was said and "source", where
    it was; of weights of which nothing is known, {"unknown": their name}.
    """
    flags = config.get("flags") or {}
    own = {name: flags[name] for name in DATA_FLAGS if flags.get(name) is not None}
    own["dataset"] = str(config.get("dataset") or "")
    own["source"] = str((config.get("data") or {}).get("source") or "")
    own["mirrored"] = flags.get("augment") != "none" and flags.get("flip_prob") != 0
    return [own, *(config.get("ancestors") or [])]


# -- states --------------------------------------------------------------------------------------


def clean_state_dict(model) -> dict[str, torch.Tensor]:
    """The state by the plain model's names (no compile or DDP prefix), contiguous for safetensors.

    safetensors refuses channels_last tensors, so those are copied; the others share memory.
    """
    return {name: tensor.contiguous() for name, tensor in plain_state_dict(model).items()}


def plain_state_dict(model) -> dict[str, torch.Tensor]:
    """The state by the plain model's names, as it lies in memory: nothing is copied."""
    return {_plain(name): tensor.detach() for name, tensor in model.state_dict().items()}


def load_state(model, state, source="weights"):
    """Copy `state` into `model`, all of it or nothing; either may carry wrappers' prefixes.

    Only BatchNorm's batch counters may be missing, as they are from torchvision's older files.
    Raises UserError that names `source` and the missing, unexpected and mismatched keys.
    """
    own = model.state_dict()  # keeps the version marks that torch's modules look for
    names = {_plain(key): key for key in own}
    state = {_known(_plain(key), names): value for key, value in state.items()}
    missing = [k for k in names.keys() - state if not k.endswith("num_batches_tracked")]
    other = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[names[k]].shape)}"
        for k in names.keys() & state
        if state[k].shape != own[names[k]].shape
    ]
    faults = {"missing": missing, "unexpected": state.keys() - names, "another shape": other}
    if any(faults.values()):
        lists = "; ".join(f"{what}: {_first(keys)}" for what, keys in faults.items() if keys)
        raise UserError(f"{source} does not fit {type(model).__name__}: {lists}")
    for key in sorted(names.keys() & state):
        if why := _not_a_weight(state[key], own[names[key]]):
            raise UserError(f"{source} can't be weights: {key} {why}")
    for key in names.keys() & state:
        own[names[key]] = state[key]
    model.load_state_dict(own)


def result_note(folder, config) -> str:
    """What is odd about the files of a run's result, or "". Raises UserError for damaged ones."""
    file = Path(folder) / "model.safetensors"
    try:
        written = written_digest(file, file.read_bytes())
    except (ValueError, AttributeError, RecursionError) as error:
        raise unreadable(file, error) from None
    if written is None:
        return "not checked: written without a hash, by an earlier version or another program"
    if config.get(DIGEST) not in (None, written):
        return "its config.json is of an older result of the run, which was killed while writing"
    return ""


def _not_a_weight(value, own):
    """Why a tensor can't take the place of another one of its shape, or None."""
    if own.is_meta:  # shapes are asked for alone
        return None
    if value.layout is not torch.strided:
        return "is stored sparsely: .to_dense() it before it is saved"
    if value.is_meta:
        return "has a shape and no values"
    if not own.is_floating_point():
        return None
    kind = str(value.dtype).removeprefix("torch.")
    if not value.is_floating_point():
        return f"holds {kind} values"
    try:
        converted = value.to(own.dtype)
    except NotImplementedError:  # torch stores float4 and computes nothing of it
        return f"holds {kind} values"
    if not converted.isfinite().all() and own.isfinite().all():
        large = f" as {str(own.dtype).removeprefix('torch.')}" if value.isfinite().all() else ""
        return f"holds values that are not finite{large}"
    return None


class Loaded(NamedTuple):
    """What `load_pretrained` did: in words, and whether the model kept its own heads."""

    text: str
    head_is_new: bool


def load_pretrained(model, pretrained, classes=None, by_order=False) -> Loaded:
    """Load what `find_weights` found into the model.

    classes: names of the model's classes in the order of the ids. The model keeps its own head
    where the loaded one is of another shape or kind, or where both know their classes and those
    are others; the text says so. Position embeddings of torchvision's vit are resized to the
    model's, and timm's networks convert what timm would. Any other mismatch is a UserError that
    lists the keys. by_order: the n-th tensor is the model's n-th, whatever its name, where all
    shapes are the same.
    """
    if pretrained.state is None:
        if by_order:
            raise UserError("--weights_by_order: there are no --weights to give out")
        return Loaded("no pretrained weights", True)
    state = {_plain(key): value for key, value in pretrained.state.items()}
    message = f"weights {pretrained.label}"
    message += f", {pretrained.words}" if pretrained.words else ""
    if by_order:
        state = _in_order(model, state, pretrained.label)
        message += "; loaded by order: shapes were checked, names were not"
    state, converted = _as_timm_would(model, state)
    names = [name for name, _ in heads(model)]
    prefixes = tuple(f"{name}." for name in names)
    theirs, ours = (
        {key: value for key, value in keys.items() if key.startswith(prefixes)}
        for keys in (state, clean_state_dict(model))
    )
    if why := _head_is_new(theirs, ours, pretrained.classes, classes):
        state = {key: value for key, value in state.items() if key not in theirs} | ours
        message += f"; head {' and '.join(names)} is new: {why}"
    state, resized = _resize_positions(model, state)
    try:
        load_state(model, state, pretrained.label)
    except UserError as error:
        if size := _size_needed(model, state, pretrained):
            error = UserError(f"{error}. These weights need --image_size {size}")
        if pretrained.words:
            error = UserError(f"{error}. Read from the file: {pretrained.words}")
        other_names = state.keys() != clean_state_dict(model).keys()
        if by_order or not other_names or _in_order(model, pretrained.state) is None:
            raise error from None
        raise UserError(
            f"{error}. All shapes match in order under other names: --weights_by_order loads them "
            "so, and checks nothing but shapes"
        ) from None
    note = f"; {pretrained.note}" if pretrained.note else ""
    return Loaded(message + converted + resized + note, bool(why))


def _head_is_new(theirs, ours, their_classes, our_classes):
    """Why the head has to be the model's own, or None: both are states of heads."""
    if not theirs:
        return "none there"
    there, here = (
        # The last matrix gives the logits; keys of one head differ in one digit at most
        max(((k, len(v)) for k, v in head.items() if v.ndim > 1), default=(None, None))[1]
        for head in (theirs, ours)
    )
    if there and there != here:
        return f"{there} classes there, {here} here"
    if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in ours.items()}:
        return "another kind there"
    known = their_classes is not None and our_classes is not None
    if known and len(their_classes) == len(our_classes) and list(our_classes) != their_classes:
        return "other classes"
    return None


def _in_order(model, state, source=None):
    """The tensors of a state under the model's names, given out in order.

    All shapes have to be the model's, but for the number of classes. Otherwise None, or with a
    `source` a UserError that names it.
    """
    ours = {_plain(name): tensor for name, tensor in model.state_dict().items()}
    prefixes = tuple(f"{name}." for name, _ in heads(model))
    no_counters = {k: v for k, v in ours.items() if not k.endswith("num_batches_tracked")}
    why = f"{len(state)} tensors there, {len(ours)} here"
    for names in (ours, no_counters):
        if len(names) != len(state):
            continue
        other = [
            (key, name)
            for (key, value), (name, own) in zip(state.items(), names.items(), strict=True)
            if value.shape != own.shape
            and not (name.startswith(prefixes) and value.shape[1:] == own.shape[1:])
        ]
        if not other:
            return dict(zip(names, state.values(), strict=True))
        key, name = other[0]
        why = f"{key} {tuple(state[key].shape)} would be {name} {tuple(names[name].shape)}"
    if source:
        raise UserError(f"--weights_by_order: {source} has other shapes: {why}")
    return None


def _as_timm_would(model, state):
    """The state as timm's own loader converts it for the model, and words where it had to.

    Positions of another image size are resized, names of the original code are translated.
    """
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    own = {key: value.shape for key, value in model.state_dict().items()}
    prefixes = tuple(f"{name}." for name, _ in heads(model))
    theirs = {key: value.shape for key, value in state.items() if not key.startswith(prefixes)}
    fits = theirs == {key: shape for key, shape in own.items() if not key.startswith(prefixes)}
    if fits or convert is None or not module.__name__.startswith("timm."):
        return state, ""
    try:
        new = convert(dict(state), model)
    except Exception:  # made for states of this network: of another one, the keys are told
        return state, ""
    resized = [key for key in new if key in theirs and new[key].shape != theirs[key]]
    words = f"; resized as timm does: {_first(resized)}" if resized else ""
    if new.keys() - state.keys() - {key for key in new if key.startswith(prefixes)}:
        words += "; names translated as timm does"
    return new, words


def _size_needed(model, state, pretrained):
    """The image size at which the network of the model has the shapes of a state, or None.

    Of timm's networks whose shapes depend on it, and that timm can't convert from one to another.
    """
    network = pretrained.network
    own = {key: value.shape for key, value in clean_state_dict(model).items()}
    if network is None or network.library != "timm" or own.keys() != state.keys():
        return None
    theirs = {key: value.shape for key, value in state.items()}
    changed = [key for key in own if own[key] != theirs[key]]
    sizes = [pretrained.preprocessing.size] if pretrained.preprocessing else []
    for size in dict.fromkeys((*sizes, *USUAL_SIZES)):
        try:
            there = skeleton(network, size).state_dict()
        except (RuntimeError, ValueError, TypeError, AssertionError):  # not at this size
            continue
        if changed and all(key in there and there[key].shape == theirs[key] for key in changed):
            return size
    return None


def _resize_positions(model, state):
    """The state with a vit's position embedding of the model's size, and words if it was not."""
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    positions = state.get("encoder.pos_embedding")
    if not isinstance(model, VisionTransformer) or positions is None:
        return state, ""
    there = positions.shape[1] - 1 if positions.ndim == 3 else 0  # one is the class token's
    old, new = math.isqrt(max(there, 0)), model.image_size // model.patch_size
    if old in (0, new) or old**2 != there:
        return state, ""
    state = interpolate_embeddings(model.image_size, model.patch_size, dict(state))
    return state, f"; position embedding resized from {old}×{old} to {new}×{new}"


# -- where they come from ------------------------------------------------------------------------


def find_weights(spec, name, stem="auto") -> Pretrained:
    """What `--weights` names, for the model `name`.

    spec: "none", "default", the name of weights that torchvision publishes or the tag of timm's,
    hf-hub:owner/name, a run folder, or a file (FILE:KEY for one state of several). torchvision's
    and timm's own download and caches are used; a filled cache needs no network. Published weights
    know all about themselves; of a run folder, timm's too, `config.json` is read; of other files
    the stem is known, from their shapes. stem: `--stem`, which wins where it can. name: see
    harness.models.names.find_model.

    Raises UserError, besides weights that can't be had, for a folder of another architecture and
    for weights that have another stem than asked.
    """
    if spec == "none":
        return Pretrained()
    network = find_model(name)
    if spec == "default" and network.hub:
        spec = network.hub
    is_file = Path(spec).exists() or Path(spec.rpartition(":")[0]).is_file()
    is_file = is_file or Path(spec).suffix or "/" in spec
    if spec.startswith(PREFIX):
        found = _on_hub(spec, network)
    elif spec != "default" and is_file:
        found = _stored(spec, network)
    elif network.library == "timm":
        found = _published_by_timm(spec, network)
    elif network.library == "torchvision":
        found = _published(spec, network.name)
    else:
        raise UserError(f"--weights {spec}: {name} takes a run folder or a file")
    state = {_plain(key): value for key, value in found.state.items()}
    if is_file or spec.startswith(PREFIX):
        state, words = _of_network(state, network, found.label)
        found = found._replace(words=", ".join(filter(None, (found.words, words))))
    state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}
    found = found._replace(state=state)
    family = family_of(network.name) if network.library == "torchvision" else Family()
    return found._replace(stem=_stem(found, family, stem), network=network)


def _of_network(state, network, source):
    """(what of a state is the network's, words of what is not): its names may have a prefix.

    Such as Lightning's `model.`, beside which may stand a loss's weights or averaged ones. The
    prefix is taken under which most of the network's own names are; of several as good ones the
    averaged, else the one that trainers use, see harness.models.reading.

    Raises UserError where several networks are there and no name says which is meant.
    """
    known = skeleton(network).state_dict().keys()
    counts = Counter(
        prefix
        for key in state
        for prefix in _prefixes(key)
        if (key[len(prefix) :].lstrip(".") if prefix else key) in known
    )
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count >= WHOLE * most]
    if most and "" not in best:
        if len(best) > 1:
            words = {prefix: set(prefix.split(".")) for prefix in best}
            usual = [p for name in (*AVERAGED, *RAW) for p in best if name in words[p]]
            if not usual:
                raise UserError(
                    f"{source} holds several networks: choose one, {source}:KEY with "
                    f"{', '.join(sorted(best))}"
                )
            best = usual
        taken = best[0]
        rest = [key for key in state if not key.startswith(f"{taken}.")]
        words = f"what is under {taken}" + (f"; not used: {_first(rest)}" if rest else "")
        return under_prefix(state, taken), words if rest else ""
    # A count that stands beside the weights is not the network's
    return {k: v for k, v in state.items() if k in known or "." in k or v.ndim}, ""


def _prefixes(key):
    """The first words of a key, from none to MOST_WORDS."""
    words = key.split(".")
    return [".".join(words[:n]) for n in range(min(len(words), MOST_WORDS + 1))]


def _stem(found, family, asked):
    """The stem to build for these weights: theirs, or what is asked where they fit both."""
    kernel = found.state.get(f"{family.stem_conv}.weight")
    seen = None
    if kernel is not None and family.stem_kernel != 3:
        seen = "small" if kernel.shape[2:] == (3, 3) else "standard"
    if asked == "auto":
        return seen or found.stem or "standard"
    if seen not in (None, asked):
        raise UserError(f"--stem {asked}: {found.label} has the {seen} stem (leave --stem out)")
    return asked


def _stored(spec, network):
    """The weights in a file or a folder, with what a config.json beside them says."""
    path, file = Path(spec), None
    if path.is_dir() or path.name == "model.safetensors":
        file = (path if path.is_dir() else path.parent) / "config.json"
    return _described(spec, spec, file, network)


def _on_hub(spec, network):
    """The weights of a model on the Hub."""
    file = model_file(spec, "config.json")
    path = model_file(spec, "model.safetensors", "pytorch_model.bin")
    return _described(spec, path, file, network)


def _described(spec, path, file, network):
    """Pretrained, of the weights at `path` and of the config.json `file` about them, if any."""
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
        name,
        stem,
        [str(label) for label in classes] if isinstance(classes, list) else None,
        preprocessing,
        tuple(recipes_of(config) if config.get("flags") else [{"unknown": str(spec)}]),
        (origin + _other_cut(cfg)) if preprocessing else None,
        weights.words,
        result_note(Path(file).parent, config) if config.get("flags") else "",
    )


def timm_cfg(network, tag=None):
    """timm's pretrained_cfg of a network's weights, as a dict."""
    import timm

    tag = tag or network.tag
    return timm.get_pretrained_cfg(f"{network.name}.{tag}" if tag else network.name).to_dict()


def _other_cut(cfg):
    """Words for images that timm would not cut as we do."""
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
        words = ImageNetInfo(subset)
        labels = [words.index_to_description(k) for k in range(words.num_classes())]
    return Pretrained(
        model.state_dict(),
        f"timm/{network.name}.{cfg['tag']}",
        network.name,
        "standard",
        list(labels) if labels else None,
        preprocessing_of(cfg, f"timm's {name}"),
        origin=f"timm's cfg of {network.name}.{cfg['tag']}" + _other_cut(cfg),
    )


def _published(spec, name):
    """The weights that torchvision publishes under a name, from its cache or the network."""
    import torchvision

    published = torchvision.models.get_model_weights(name)
    if spec != "default" and spec not in published.__members__:
        hint = nearest(spec, published.__members__)
        raise UserError(f"{name} has no weights {spec}{hint} (and no file is called so)")
    weights = published.DEFAULT if spec == "default" else published[spec]
    if not weights.meta.get("categories"):  # vgg16's IMAGENET1K_FEATURES: its classifier is NaN
        whole = ", ".join(w.name for w in published if w.meta.get("categories"))
        raise UserError(f"{weights} has convolutions only, no classifier: take {whole}")
    try:  # torch.hub would unpickle a cached file freely, so say weights_only here
        state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, no space, a damaged or hostile file in the cache
        cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise UserError(
            f"{weights} could not be loaded ({reason_of(error)}): they belong at {cached}; where "
            f"there is a network, python -c 'from torchvision.models import *; "
            f"{weights}.get_state_dict(check_hash=True)' puts them there"
        ) from None
    own = weights.transforms()
    mean, std = family_of(name).colours or (own.mean, own.std)
    size, resized = own.crop_size[0], own.resize_size[0]
    return Pretrained(
        state,
        str(weights),
        name,
        "standard",
        list(weights.meta["categories"]),
        Preprocessing(size, size / resized, own.interpolation.value, tuple(mean), tuple(std)),
        origin=f"torchvision's transforms of {weights}",
    )


def _plain(key):
    """A state key without the names that torch.compile, FSDP, checkpointing and DDP add."""
    for name in WRAPPERS:
        key = key.replace(name, "")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _known(key, names):
    """The key, or what it is called now where `names` does not know it."""
    for old, new in OLD_KEYS:
        key = key if key in names else old.sub(new, key)
    return key


def _first(keys):
    """The first three of some keys and how many more there are."""
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

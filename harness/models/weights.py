"""Weights: found by what `--weights` says, read without unpickling, loaded into a model.

Where they come from also says how they want their images, and which classes their head knows.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from harness.data.preprocessing import Preprocessing, preprocessing_of
from harness.errors import UserError, nearest
from harness.files import is_lfs_pointer
from harness.models.build import Family, family_of, library_of, one_line
from harness.models.config import DATA_FLAGS, read_config
from harness.models.heads import heads

# Names in torchvision's older weight files -> names in its models now.
OLD_KEYS = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
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
    for key in names.keys() & state:
        own[names[key]] = state[key]
    model.load_state_dict(own)


def load_weights(path) -> dict[str, torch.Tensor]:
    """The state in a run folder, a .safetensors or a .pth file. Nothing is ever unpickled.

    A .pth may also hold the state under "state_dict" or "model". Raises UserError naming the file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    if is_lfs_pointer(path):
        raise UserError(f"{path} is a Git LFS pointer, not the file: git lfs pull")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"{path}: weights are read from .safetensors or .pth files")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file: torch alone raises six kinds for damaged ones
        raise UserError(
            f"{path} can't be read as plain tensors, and nothing in it was run ({one_line(error)})"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in state.items()
    ):
        raise UserError(f"{path} is not a state dict (names of tensors)")
    return state


class Loaded(NamedTuple):
    """What `load_pretrained` did: in words, and whether the model kept its own heads."""

    text: str
    head_is_new: bool


def load_pretrained(model, pretrained, classes=None) -> Loaded:
    """Load what `find_weights` found into the model.

    classes: names of the model's classes in the order of the ids. The model keeps its own head
    where the loaded one is of another shape or kind, or where both know their classes and those
    are others; the text says so. Position embeddings of torchvision's vit are resized to the
    model's. Any other mismatch is a UserError that lists the keys.
    """
    if pretrained.state is None:
        return Loaded("no pretrained weights", True)
    state = {_plain(key): value for key, value in pretrained.state.items()}
    message = f"weights {pretrained.label}"
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
    load_state(model, state, pretrained.label)
    return Loaded(message + resized, bool(why))


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

    spec: "none", "default", the name of weights that torchvision publishes, a run folder, or a
    file. torchvision's own download and cache are used; a filled cache needs no network. Published
    weights know all about themselves; of a run folder, timm's too, `config.json` is read; of other
    files the stem is known, from their shapes. stem: `--stem`, which wins where it can.

    Raises UserError, besides weights that can't be had, for a folder of another architecture and
    for weights that have another stem than asked.
    """
    if spec == "none":
        return Pretrained()
    library = library_of(name)
    if spec != "default" and (Path(spec).exists() or Path(spec).suffix or "/" in spec):
        found = _stored(spec, name)
    elif library != "torchvision":
        raise UserError(f"--weights {spec}: {name} takes a run folder or a file")
    else:
        found = _published(spec, name)
    state = {_plain(key): value for key, value in found.state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}
    found = found._replace(state=state)
    family = family_of(name) if library == "torchvision" else Family()
    return found._replace(stem=_stem(found, family, stem))


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


def _stored(spec, name):
    """The weights in a file or a folder, with what a config.json beside them says."""
    path, config = Path(spec), {}
    if path.is_dir() or path.name == "model.safetensors":
        file = (path if path.is_dir() else path.parent) / "config.json"
        config = read_config(file)
    architecture = config.get("architecture")
    if architecture not in (None, name):
        raise UserError(f"{spec} holds a {architecture}: add --model {architecture}")
    classes, stem = config.get("label_names"), config.get("stem")
    return Pretrained(
        load_weights(spec),
        spec,
        architecture,
        stem,
        [str(label) for label in classes] if isinstance(classes, list) else None,
        preprocessing_of(config["pretrained_cfg"], file) if "pretrained_cfg" in config else None,
        tuple(recipes_of(config) if config.get("flags") else [{"unknown": str(spec)}]),
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
            f"{weights} could not be loaded ({one_line(error)}): they belong at {cached}; where "
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
    )


def _plain(key):
    """A state key without the prefixes of torch.compile and DDP."""
    key = key.replace("_orig_mod.", "")
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

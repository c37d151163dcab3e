"""Classifiers: built by name, fitted to small images, filled with weights, rebuilt from JSON.

torchvision's classifiers by their names, timm's where timm is installed; on equal names
torchvision wins. What their code does not say of itself stands in one table, FAMILIES.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torchvision
from torch import nn

from harness.errors import UserError
from harness.flags import nearest

SMALL_IMAGE = 64  # pixels a side up to which `--stem auto` takes the small stem


@dataclass(frozen=True)
class Family:
    """Facts about one torchvision family.

    stem_conv: the first convolution; the small stem makes it 3×3, stride 1, padding 1.
    stem_pool: the max-pool after it, which the small stem removes.
    arguments: what the constructor has to be told for images of so many pixels a side.
    """

    stem_conv: str | None = None
    stem_pool: str | None = None
    arguments: Callable[[int], dict] = lambda pixels: {}


def _without_auxiliary_heads(pixels):
    """So that googlenet and inception return a tensor in training too.

    Their published weights expect pixels normalised with mean = std = 0.5, whatever torchvision's
    metadata says (its builder sets `transform_input`, which comes to the same).
    """
    return {"aux_logits": False, "init_weights": False}


# The longest key that a name starts with is its family. A family without `stem_conv` has no small
# stem: it starts at stride 1 (vgg), counts its positions in patches (vit, swin, maxvit), or ends
# in pools made for 224 px (alexnet, squeezenet).
FAMILIES = {
    "alexnet": Family(),
    "convnext": Family("features.0.0"),
    "densenet": Family("features.conv0", "features.pool0"),
    "efficientnet": Family("features.0.0"),
    "googlenet": Family("conv1.conv", "maxpool1", _without_auxiliary_heads),
    "inception": Family("Conv2d_1a_3x3.conv", "maxpool1", _without_auxiliary_heads),
    "maxvit": Family(arguments=lambda pixels: {"input_size": (pixels, pixels)}),
    "mnasnet": Family("layers.0"),
    "mobilenet": Family("features.0.0"),
    "regnet": Family("stem.0"),
    "resnet": Family("conv1", "maxpool"),
    "resnext": Family("conv1", "maxpool"),
    "shufflenet": Family("conv1.0", "maxpool"),
    "squeezenet": Family(),
    "swin": Family(),
    "vgg": Family(),
    "vit": Family(arguments=lambda pixels: {"image_size": pixels}),
    "wide_resnet": Family("conv1", "maxpool"),
}

# Names in torchvision's older weight files -> names in its models now.
OLD_KEYS = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)


class DropoutLinear(nn.Linear):
    """A linear layer with dropout on its input; its state has the keys of a plain nn.Linear."""

    p = 0.0

    def forward(self, features):
        return super().forward(nn.functional.dropout(features, self.p, self.training))

    def extra_repr(self):
        return f"{super().extra_repr()}, dropout={self.p}"


# -- build ---------------------------------------------------------------------------------------


def build_model(
    name, num_classes, *, image_size, stem="auto", dropout=None, library=None
) -> nn.Module:
    """A classifier (N, 3, image_size, image_size) -> logits (N, num_classes), weights random.

    stem: see `resolve_stem`. dropout: probability before the head; None leaves the model's own,
    a number replaces it, where the family has none too, without changing the state's keys.
    library: "torchvision" or "timm", where a name is in both.

    Raises UserError for an unknown name, a stem the family lacks, or an image size at which the
    model does not run (seen from one forward pass of a zero image, which draws nothing).
    """
    library = library_of(name, library)
    stem = resolve_stem(name, stem, image_size, library)
    arguments = (name, library, num_classes, stem, dropout)
    model, error = _try_build(*arguments, image_size)
    if error is None:
        return model
    for pixels in sorted(range(16, image_size + 257, 16), key=lambda p: abs(p - image_size)):
        with torch.device("meta"):  # shapes only
            _, failed = _try_build(*arguments, pixels)
        if not failed:
            hint = f"the nearest size seen to work is --image_size {pixels}"
            break
    else:
        hint = _one_line(error)
    raise UserError(f"{name} ({stem} stem) does not run at {image_size} px: {hint}")


def library_of(name, library=None) -> str:
    """Whose model `name` is: "torchvision" or "timm"; `library` chooses where it is in both.

    Raises UserError that gives the nearest name.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name in known and library != "timm":
        return "torchvision"
    if importlib.util.find_spec("timm") is None:
        raise UserError(f'unknown model "{name}"{nearest(name, known)} (timm is not installed)')
    import timm

    if timm.is_model(name) and library != "torchvision":
        return "timm"
    hint = nearest(name, known) or nearest(name, timm.list_models())
    raise UserError(f'unknown model "{name}" in {library or "torchvision and timm"}{hint}')


def resolve_stem(name, stem, image_size, library="torchvision") -> str:
    """ "small" or "standard", from "auto" too: small up to 64 px where the family has one.

    The small stem is one 3×3 convolution of stride 1 and no max-pool in place of the family's own
    (of total stride 4 in resnet, densenet and convnext, 2 in mobilenet and efficientnet).
    """
    has_small = library == "torchvision" and _family(name).stem_conv is not None
    if stem == "auto":
        return "small" if has_small and image_size <= SMALL_IMAGE else "standard"
    if stem == "small" and not has_small:
        names = ", ".join(key for key, family in FAMILIES.items() if family.stem_conv)
        raise UserError(f"--stem small: {library}'s {name} has none; families that do: {names}")
    return stem


def head(model) -> tuple[str, nn.Module]:
    """(name, module) of the last layer, which gives the logits: Linear, or squeezenet's Conv2d."""
    name = getattr(model, "pretrained_cfg", {}).get("classifier")  # timm says it itself
    if isinstance(name, str) and name in dict(model.named_modules()):
        return name, model.get_submodule(name)
    for kind in (nn.Linear, nn.Conv2d):
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]
        if found:
            return found[-1]
    raise ValueError(f"{type(model).__name__} has neither a linear nor a convolutional layer")


def initialise(model, how="auto", generator=None) -> str:
    """Draw the weights anew where asked, and return the word for what was done.

    "kaiming": tricks.init.kaiming_normal_. "own": what the constructor drew stays. "auto": kaiming
    for networks with BatchNorm2d and without LayerNorm (not transformers, ConvNeXt, plain vgg).
    """
    if how == "auto":
        batch_norm, layer_norm = (
            any(isinstance(module, kind) for module in model.modules())
            for kind in (nn.BatchNorm2d, nn.LayerNorm)
        )
        how = "kaiming" if batch_norm and not layer_norm else "own"
    if how == "kaiming":
        from tricks.init import kaiming_normal_

        kaiming_normal_(model, generator)
    return how


def describe(model) -> dict:
    """What the plan prints: counts of parameters, and the head as "fc: 512 → 10"."""
    name, last = head(model)
    outputs, inputs = last.weight.shape[:2]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head": f"{name}: {inputs} → {outputs}",
    }


def _family(name):
    return FAMILIES[max((key for key in FAMILIES if name.startswith(key)), key=len)]


def _try_build(name, library, num_classes, stem, dropout, image_size):
    """(model, None), or (None, the error) where it can't be built for or run at this size."""
    try:
        if library == "timm":
            model = _build_timm(name, num_classes, dropout, image_size)
        else:
            model = _build_torchvision(name, num_classes, stem, dropout, image_size)
        model.eval()
        with torch.no_grad():
            image = torch.zeros(1, 3, image_size, image_size, device=head(model)[1].weight.device)
            logits = model(image)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        return None, error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        raise UserError(f"{name} is no plain classifier: it does not return {num_classes} logits")
    return model.train(), None


def _build_torchvision(name, num_classes, stem, dropout, image_size):
    family = _family(name)
    model = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **family.arguments(image_size)
    )
    if stem == "small":
        old = model.get_submodule(family.stem_conv)
        small = nn.Conv2d(3, old.out_channels, 3, padding=1, bias=old.bias is not None)
        model.set_submodule(family.stem_conv, small)
        if family.stem_pool:
            model.set_submodule(family.stem_pool, nn.Identity())
    if dropout is not None:
        _set_dropout(model, dropout)
    return model


def _build_timm(name, num_classes, dropout, image_size):
    import timm

    arguments = {} if dropout is None else {"drop_rate": dropout}
    if timm.get_pretrained_cfg(name).fixed_input_size:
        arguments["img_size"] = image_size
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **arguments)


def _set_dropout(model, p):
    """Dropout `p` before the head: in the classifier's own layers, or in the head itself."""
    own = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and name.split(".")[0] in ("classifier", "dropout")
    ]
    for module in own:
        module.p = p
    if p and not own:
        name, linear = head(model)
        with torch.device("meta"):  # draws nothing: the parameters are the old layer's
            new = DropoutLinear(linear.in_features, linear.out_features)
        new.weight, new.bias, new.p = linear.weight, linear.bias, p
        model.set_submodule(name, new)


# -- config.json ---------------------------------------------------------------------------------


def model_config(
    architecture, classes, image_size, mean, std, *, stem, dropout=None, library="torchvision"
) -> dict:
    """What `config.json` says of the model: enough for `rebuild_model`, in timm's words.

    classes: names in the order of the ids. mean, std: per channel, of pixels in [0, 1].
    stem: as resolved. A torchvision ResNet with its standard stem can be loaded by timm itself.
    """
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "label_names": list(classes),
        "pretrained_cfg": {
            "input_size": [3, image_size, image_size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [float(m) for m in mean],
            "std": [float(s) for s in std],
            "num_classes": len(classes),
        },
        "library": library,
        "stem": stem,
        "dropout": dropout,
    }


def rebuild_model(config) -> nn.Module:
    """The model that `model_config` described, weights random; UserError for another's JSON."""
    try:
        return build_model(
            config["architecture"],
            config["num_classes"],
            image_size=config["pretrained_cfg"]["input_size"][-1],
            stem=config["stem"],
            dropout=config["dropout"],
            library=config["library"],
        )
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"config.json is not one of this project's ({error!r})") from None


# -- weights -------------------------------------------------------------------------------------


def clean_state_dict(model) -> dict[str, torch.Tensor]:
    """The state by the plain model's names (no compile or DDP prefix), contiguous for safetensors.

    safetensors refuses channels_last tensors, so those are copied; the others share memory.
    """
    return {_plain(k): v.detach().contiguous() for k, v in model.state_dict().items()}


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
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"{path}: weights are read from .safetensors or .pth files")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file: torch alone raises six kinds for damaged ones
        raise UserError(
            f"{path} can't be read as plain tensors, and nothing in it was run ({_one_line(error)})"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in state.items()
    ):
        raise UserError(f"{path} is not a state dict (names of tensors)")
    return state


def resolve_weights(spec, name):
    """The state and a label for `--weights`, or (None, "none").

    spec: "none", "default", the name of weights that torchvision publishes, a run folder, or a
    file. torchvision's own download and cache are used; a filled cache needs no network.
    """
    if spec == "none":
        return None, "none"
    if spec != "default" and (Path(spec).exists() or Path(spec).suffix or "/" in spec):
        return load_weights(spec), spec
    if library_of(name) == "timm":
        raise UserError(f"--weights {spec}: timm's {name} takes a run folder or a file")
    published = torchvision.models.get_model_weights(name)
    if spec != "default" and spec not in published.__members__:
        hint = nearest(spec, published.__members__)
        raise UserError(f"{name} has no weights {spec}{hint} (and no file is called so)")
    weights = published.DEFAULT if spec == "default" else published[spec]
    try:  # torch.hub would unpickle a cached file freely, so say weights_only here
        state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, no space, a damaged or hostile file in the cache
        cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise UserError(
            f"{weights} could not be loaded ({_one_line(error)}): they belong at {cached}; where "
            f"there is a network, python -c 'from torchvision.models import *; "
            f"{weights}.get_state_dict(check_hash=True)' puts them there"
        ) from None
    auxiliary = ("aux1.", "aux2.", "AuxLogits.")  # heads that we build googlenet, inception without
    return {k: v for k, v in state.items() if not k.startswith(auxiliary)}, str(weights)


def load_pretrained(model, spec, name) -> str:
    """Load `--weights` into the model and return the line that says what was loaded.

    A head for another number of classes stays as `model` has it, and the line says so. Any other
    mismatch is a UserError that lists the keys.
    """
    state, label = resolve_weights(spec, name)
    if state is None:
        return "no pretrained weights"
    state = {_plain(key): value for key, value in state.items()}
    own, (head_name, _) = clean_state_dict(model), head(model)
    weight, bias = f"{head_name}.weight", f"{head_name}.bias"
    theirs, ours = state.get(weight, own[weight]).shape, own[weight].shape
    message = f"weights {label}"
    if theirs[1:] == ours[1:] and theirs[:1] != ours[:1]:
        state |= {key: own[key] for key in (weight, bias) if key in own}
        message += f"; head {head_name} is new: {theirs[0]} classes there, {ours[0]} here"
    load_state(model, state, label)
    return message


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


def _one_line(error):
    """The kind of an error and the start of its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"

"""Classifiers: built by name, fitted to small images, cut into blocks, rebuilt from JSON.

torchvision's classifiers and timm's by their names (harness.models.names), and this project's own
(harness.models.fastnet). What torchvision's code does not tell about its
networks is in one table, FAMILIES.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from harness.errors import UserError, reason_of
from harness.models import fastnet
from harness.models.heads import HEADS, DropoutLinear, MlpHead, head, heads
from harness.models.names import check_arguments, find_model
from tricks.whitening import whiten_conv_

WHITENED = 5000  # images that the whitening layer is computed from
SMALL_IMAGE = 64  # pixels a side up to which `--stem auto` takes the small stem


@dataclass(frozen=True)
class Family:
    """Facts about one torchvision family.

    stem_conv: the first convolution; the small stem makes it 3×3, stride 1, padding 1.
    stem_pool: the max-pool after it, which the small stem removes.
    stem_kernel: side of the standard stem's kernel; if not 3, its shape tells the stem of weights.
    trunk: the container whose children are the blocks of the network; "" is the network itself.
    arguments: pixels a side -> the constructor's arguments for images of that size.
    colours: the mean and std that published weights expect, where the metadata has others.
    """

    stem_conv: str | None = None
    stem_pool: str | None = None
    stem_kernel: int = 3
    trunk: str = ""
    arguments: Callable[[int], dict] = lambda pixels: {}
    colours: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def _without_auxiliary_heads(pixels):
    """Arguments with which googlenet and inception return a tensor in training too."""
    return {"aux_logits": False, "init_weights": False}


# With published weights, torchvision's googlenet and inception set `transform_input`, which turns
# the normalisation that the metadata names into this one. Our builder does not set it.
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# The longest key that a name starts with is its family. A family without `stem_conv` has no small
# stem: it starts at stride 1 (vgg), counts its positions in patches (vit, swin, maxvit), or ends
# in pools made for 224 px (alexnet, squeezenet).
FAMILIES = {
    "alexnet": Family(trunk="features"),
    "convnext": Family("features.0.0", stem_kernel=4, trunk="features"),
    "densenet": Family("features.conv0", "features.pool0", stem_kernel=7, trunk="features"),
    "efficientnet": Family("features.0.0", trunk="features"),
    "googlenet": Family(
        "conv1.conv",
        "maxpool1",
        stem_kernel=7,
        arguments=_without_auxiliary_heads,
        colours=HALVES,
    ),
    "inception": Family(
        "Conv2d_1a_3x3.conv", "maxpool1", arguments=_without_auxiliary_heads, colours=HALVES
    ),
    "maxvit": Family(trunk="blocks", arguments=lambda pixels: {"input_size": (pixels, pixels)}),
    "mnasnet": Family("layers.0", trunk="layers"),
    "mobilenet": Family("features.0.0", trunk="features"),
    "regnet": Family("stem.0", trunk="trunk_output"),
    "resnet": Family("conv1", "maxpool", stem_kernel=7),
    "resnext": Family("conv1", "maxpool", stem_kernel=7),
    "shufflenet": Family("conv1.0", "maxpool"),
    "squeezenet": Family(trunk="features"),
    "swin": Family(trunk="features"),
    "vgg": Family(trunk="features"),
    "vit": Family(trunk="encoder.layers", arguments=lambda pixels: {"image_size": pixels}),
    "wide_resnet": Family("conv1", "maxpool", stem_kernel=7),
}

# -- build ---------------------------------------------------------------------------------------


def build_model(
    name, num_classes, *, image_size, stem="auto", dropout=None, head="linear", library=None,
    arguments=None,
) -> nn.Module:  # fmt: skip
    """A classifier (N, 3, image_size, image_size) -> logits (N, num_classes), weights random.

    stem: see `resolve_stem`. dropout: probability before the head; None keeps the model's own, a
    number replaces it, or adds one where the family has none; the state's keys stay the same.
    head: "linear", the model's own last layer, or "mlp", an `MlpHead` in its place.
    name, library: see harness.models.names.find_model. arguments: further arguments of timm's
    constructor; None for those of a model on the Hub, from its config.json.

    Raises UserError for an unknown name, a stem that the family lacks, an mlp where the last layer
    is not linear or where `dropout` would have no effect, or an image size at which the model does
    not run (tested by one forward pass of a zero image, which draws no random numbers).
    """
    if head not in HEADS:
        raise UserError(f'unknown head "{head}": {" or ".join(HEADS)}')
    network = find_model(name, library)
    if arguments is not None:
        network = network._replace(arguments=arguments)
    stem = resolve_stem(name, stem, image_size, library)
    arguments = (network, num_classes, stem, dropout, head)
    model, error = _try_build(*arguments, image_size)
    if error is not None and _lacks_memory(error):
        raise UserError(
            f"{name} at {image_size} px: {reason_of(error)}; take a smaller --image_size"
        )
    if error is None:
        _pad_single_pixels(model)
        return model
    for pixels in sorted(range(16, image_size + 257, 16), key=lambda p: abs(p - image_size)):
        with torch.device("meta"):  # shapes only
            _, trial_error = _try_build(*arguments, pixels)
        if not trial_error and pixels != image_size:
            hint = f"the nearest size seen to work is --image_size {pixels}"
            break
    else:
        hint = reason_of(error)
    raise UserError(f"{name} ({stem} stem) does not run at {image_size} px: {hint}")


def _lacks_memory(error):
    """Whether an error is a lack of memory: then no image size near this one would run."""
    text = str(error).lower()
    return any(phrase in text for phrase in ("memory", "storage size", "overflow", "too large"))


def _pad_single_pixels(model):
    """Correct the bf16 gradient, on a CPU, of strided convolutions whose input is one pixel.

    oneDNN (torch 2.15) leaves uninitialised memory in the gradient of their weights: numbers up to
    1e37, or NaN, in the taps beside the middle one. Those taps see only padding: their gradient is
    0. Where the input is padded with zeros beforehand, the gradient of the same convolution is
    right.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and min(module.stride) > 1:
            kernel, padding = module.kernel_size, module.padding
            if padding != "same" and all(
                k == 2 * p + 1 > 1 for k, p in zip(kernel, padding, strict=True)
            ):
                module.register_forward_pre_hook(_padded_pixel)


def _padded_pixel(module, inputs):
    (images,) = inputs
    if images.shape[-2:] == (1, 1) and torch.is_autocast_enabled("cpu"):
        return (F.pad(images, (0, 1, 0, 1)),)  # a stride of 2 or more still gives one pixel
    return None


def resolve_stem(name, stem, image_size, library=None) -> str:
    """The stem to build, "small" or "standard"; "auto": small up to 64 px where the family has one.

    The small stem is one 3×3 convolution of stride 1 and no max-pool in place of the family's own
    (of total stride 4 in resnet, densenet and convnext, 2 in mobilenet and efficientnet).
    """
    library, name, *_ = find_model(name, library)
    has_small = library == "torchvision" and family_of(name).stem_conv is not None
    if stem == "auto":
        return "small" if has_small and image_size <= SMALL_IMAGE else "standard"
    if stem == "small" and not has_small:
        names = ", ".join(key for key, family in FAMILIES.items() if family.stem_conv)
        raise UserError(f"--stem small: {library}'s {name} has none; families that do: {names}")
    return stem


def blocks(model, name, library=None) -> list[tuple[str, ...]]:
    """The blocks of the network from the input to the head, each as names of modules or parameters.

    Together the blocks hold every parameter exactly once. All that comes before the family's trunk
    is the first block; each child of the trunk is a block, and so is each layer between trunk and
    head. A module that has only norms and biases (parameters of one dimension) joins the block
    before it. The last block is the head, or all heads. For timm's networks, the blocks are those
    of their own `group_matcher`.

    model: from `build_model`; name, library: those that it was built with.
    """
    library, name, *_ = find_model(name, library)
    names = tuple(name for name, _ in heads(model))
    if library == "timm" and hasattr(model, "group_matcher"):
        return [*_matched_blocks(model, names), names]
    trunk = family_of(name).trunk if library == "torchvision" else ""
    containers = {trunk, *_parents(trunk), *(parent for name in names for parent in _parents(name))}
    groups, stem = [], True
    for child, parameters in _children(model, containers):
        if child in names or not parameters:
            continue
        in_trunk = not trunk or child.startswith(f"{trunk}.")
        if groups and (all(p.ndim <= 1 for p in parameters) or (stem and not in_trunk)):
            groups[-1] += (child,)
        else:
            groups.append((child,))
        stem = stem and not in_trunk
    return [*groups, names]


def _matched_blocks(model, head_names):
    """The blocks of a timm network before its heads, by its own coarse `group_matcher`."""
    from timm.models import group_parameters

    numbers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    parameters = dict(model.named_parameters())
    names_by_number = {}
    for child, number in _largest_modules(model, numbers, head_names):
        names_by_number.setdefault(number, []).append(child)
    blocks = []
    for number in sorted(names_by_number):
        prefixes = tuple(f"{child}." for child in names_by_number[number])
        weights = [p for n, p in parameters.items() if f"{n}.".startswith(prefixes)]
        if blocks and all(p.ndim <= 1 for p in weights):
            blocks[-1] += tuple(names_by_number[number])
        else:
            blocks.append(tuple(names_by_number[number]))
    return blocks


def _largest_modules(module, numbers, head_names, prefix=""):
    """(name, number) of the largest modules inside one whose parameters share one number."""
    for name, _ in module.named_parameters(prefix, recurse=False):
        yield name, numbers[name]
    for name, child in module.named_children():
        name = f"{prefix}.{name}" if prefix else name
        child_numbers = {numbers[n] for n, _ in child.named_parameters(name) if n in numbers}
        if name in head_names or not child_numbers:
            continue
        if len(child_numbers) > 1 or any(head.startswith(f"{name}.") for head in head_names):
            yield from _largest_modules(child, numbers, head_names, name)
        else:
            yield name, child_numbers.pop()


def _children(module, containers, prefix=""):
    """(name, its parameters) of a module's children in order; of `containers`, their children."""
    for name, parameter in module.named_parameters(prefix, recurse=False):
        yield name, [parameter]
    for name, child in module.named_children():
        name = f"{prefix}.{name}" if prefix else name
        if name in containers:
            yield from _children(child, containers, name)
        else:
            yield name, list(child.parameters())


def _parents(name):
    """The names of the modules that contain a module, without the network itself."""
    path = name.split(".")
    return [".".join(path[:n]) for n in range(1, len(path))]


def initialise(model, method="auto", generator=None) -> str:
    """Initialise the weights by a method; returns the method that "auto" chose.

    "kaiming": tricks.init.kaiming_normal_. "own": the weights that the constructor drew stay.
    "auto": kaiming for networks with BatchNorm2d and without LayerNorm (not transformers, ConvNeXt,
    plain vgg), except for FastNet, whose constructor starts its filters in another way.
    """
    if method == "auto" and isinstance(model, fastnet.FastNet):
        method = "own"
    elif method == "auto":
        batch_norm, layer_norm = (
            any(isinstance(module, kind) for module in model.modules())
            for kind in (nn.BatchNorm2d, nn.LayerNorm)
        )
        method = "kaiming" if batch_norm and not layer_norm else "own"
    if method == "kaiming":
        from tricks.init import kaiming_normal_

        kaiming_normal_(model, generator)
    return method


def whiten(model, images):
    """Compute the first layer of a FastNet from images; other networks stay as they are.

    images: a function of a number -> at most that many images of train (n, 3, H, W), normalised.
    Every process computes the same weights.
    """
    if isinstance(model, fastnet.FastNet):
        whiten_conv_(model.whitening, images(WHITENED))


def check_start_size(model, name, start, full) -> int:
    """Pixels a side in the first step: `--start_size`, or `full` where it is None.

    Raises UserError where it is above `full`, or where the network does not run at that size.
    """
    if start is None:
        return full
    if start > full:
        raise UserError(f"--start_size {start} is above the image size, {full}")
    training = model.training
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model.eval()(torch.zeros(1, 3, start, start, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"--start_size {start}: {name} does not run at that size: {reason_of(error)}"
        ) from None
    finally:
        model.train(training)
    return start


def check_microbatch(model, images, size):
    """Raise UserError where BatchNorm would see a single value a channel: one pixel of one image.

    images: how many of them a forward pass has in training. size: their pixels a side. model: in
    the modes that it is trained in; it is not changed.
    """
    if images > 1:
        return
    shadow = copy.deepcopy(model).to("meta")  # shapes only
    try:
        shadow(torch.zeros(1, 3, size, size, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise UserError(
                "one image a forward pass is too few for this network's BatchNorm: choose a larger "
                "--batch_size, or fewer --gradient_accumulation_steps"
            ) from None
    except (RuntimeError, NotImplementedError):  # an operation that needs values
        return


def describe(model) -> dict:
    """What the plan prints: counts of parameters, and the head as "fc: 512 → 256 → 10"."""
    names = " and ".join(name for name, _ in heads(model))
    layers = [m.weight for m in head(model)[1].modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    widths = [layers[0].shape[1], *(weight.shape[0] for weight in layers)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head": f"{names}: {' → '.join(map(str, widths))}",
    }


def skeleton(network, size=None) -> nn.Module:
    """A network (harness.models.names.Network) as it is built by default, without any values.

    size: pixels a side that a network of timm is built for; None: the size of its weights.
    """
    with torch.device("meta"):
        if network.library == "own":
            return _build_own(network.name, 10, None)
        if network.library == "timm":
            size = size or timm_size(network.name)
            return _build_timm(network.name, 10, None, size, network.arguments)
        with contextlib.suppress(NotImplementedError):
            return _build_torchvision(network.name, 10, "standard", None, 224)
    # googlenet's and inception's constructors draw values, which meta tensors can't have
    return _build_torchvision(network.name, 10, "standard", None, 224).to("meta")


def family_of(name) -> Family:
    """The facts about the family of one of torchvision's classifiers."""
    return FAMILIES[max((key for key in FAMILIES if name.startswith(key)), key=len)]


def _try_build(network, num_classes, stem, dropout, kind, image_size):
    """(model, None), or (None, the error) where it can't be built for or run at this size."""
    name = network.name
    try:
        if network.library == "own":
            model = _build_own(name, num_classes, dropout)
        elif network.library == "timm":
            model = _build_timm(name, num_classes, dropout, image_size, network.arguments)
        else:
            model = _build_torchvision(name, num_classes, stem, dropout, image_size)
        if kind == "mlp":
            _set_mlp(model, name, num_classes)
        model.eval()
        with torch.no_grad():
            device = next(model.parameters()).device
            logits = model(torch.zeros(1, 3, image_size, image_size, device=device))
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        return None, error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        raise UserError(f"{name} is no plain classifier: it does not return {num_classes} logits")
    return model.train(), None


def _build_torchvision(name, num_classes, stem, dropout, image_size):
    import torchvision

    family = family_of(name)
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


def _build_own(name, num_classes, dropout):
    model = fastnet.FastNet(num_classes, fastnet.WIDTHS[name])
    if dropout:
        _set_dropout(model, dropout)
    return model


def timm_size(name):
    """Pixels a side of the images that timm's default weights of a network expect."""
    import timm

    return timm.get_pretrained_cfg(name).input_size[-1]


def _build_timm(name, num_classes, dropout, image_size, arguments):
    import timm

    arguments = arguments | ({} if dropout is None else {"drop_rate": dropout})
    if timm.get_pretrained_cfg(name).fixed_input_size:
        arguments["img_size"] = image_size
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, **arguments)
    model.head_names = _timm_heads(name, arguments)
    return model


def _timm_heads(name, arguments):
    """The names of the layers that give a timm network's logits.

    They are those that `reset_classifier` replaces and those that its cfg names as "classifier":
    the cfg may lack one (levit's `head_dist`), and `reset_classifier` may leave one out (repvit's).
    """
    import timm

    with torch.device("meta"):  # shapes only
        model = timm.create_model(name, pretrained=False, num_classes=7, **arguments)
        if not hasattr(model, "reset_classifier"):
            return []  # an encoder without a head, refused later: it returns no logits
        # Kept, so that no new parameter has the id of an old one
        old_parameters = list(model.parameters())
        classifier_names = model.pretrained_cfg.get("classifier") or ()
        if isinstance(classifier_names, str):
            classifier_names = [classifier_names]
        layers = dict(model.named_modules())
        classifier_names = [name for name in classifier_names if _has_outputs(layers.get(name), 7)]
        model.reset_classifier(7)
    old_ids = {id(parameter) for parameter in old_parameters}
    new_names = [
        name
        for name, module in model.named_modules()
        if _has_outputs(module, 7) and id(module.weight) not in old_ids
    ]
    return list(dict.fromkeys([*new_names, *classifier_names]))


def _has_outputs(module, number):
    return isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == number


def _set_dropout(model, p):
    """Dropout `p` before the head: in the classifier's own layers, or in the head itself."""
    dropout_layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout) and name.split(".")[0] in ("classifier", "dropout")
    ]
    for module in dropout_layers:
        module.p = p
    for name, linear in heads(model) if p and not dropout_layers else ():
        with torch.device("meta"):  # draws nothing: the parameters are the old layer's
            new = DropoutLinear(linear.in_features, linear.out_features)
        new.weight, new.bias, new.p = linear.weight, linear.bias, p
        model.set_submodule(name, new)


def _set_mlp(model, architecture, num_classes):
    for name, layer in heads(model):
        if not isinstance(layer, nn.Linear):
            kind = type(layer).__name__
            raise UserError(
                f"--head mlp: {architecture}'s last layer is a {kind}, not a linear one"
            )
        if isinstance(layer, DropoutLinear):
            raise UserError(
                f"--dropout with --head mlp: {architecture} has no dropout of its own, and the "
                "mlp's is 0.5 and 0.3"
            )
        with layer.weight.device:
            model.set_submodule(name, MlpHead(layer.in_features, num_classes))


# -- config.json ---------------------------------------------------------------------------------


def model_config(
    architecture,
    classes,
    image_size,
    mean,
    std,
    *,
    stem,
    dropout=None,
    head="linear",
    library="torchvision",
    arguments=None,
    crop_pct=1.0,
    interpolation="bilinear",
) -> dict:
    """What `config.json` says of the model: enough for `rebuild_model`, in timm's words.

    classes: names in the order of the ids. mean, std: per channel, of pixels in [0, 1].
    stem: from `resolve_stem`. crop_pct: the share of the resized side that the network sees.
    With a linear head, timm's networks can be loaded by timm itself, and so can a torchvision
    ResNet with its standard stem.
    """
    about_timm = _timm_facts(architecture) if library == "timm" else {}
    if about_timm.get("fixed_input_size"):  # timm does not read it off input_size everywhere
        arguments = {**(arguments or {}), "img_size": image_size}
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "label_names": list(classes),
        "pretrained_cfg": {
            "input_size": [3, image_size, image_size],
            "interpolation": interpolation,
            "crop_pct": float(crop_pct),
            "mean": [float(m) for m in mean],
            "std": [float(s) for s in std],
            "num_classes": len(classes),
            **about_timm,
        },
        **({"model_args": arguments} if arguments else {}),
        "library": library,
        "stem": stem,
        "dropout": dropout,
        "head": head,
    }


def _timm_facts(name):
    """What timm's own loader has to know about a network besides its images."""
    import timm

    cfg = timm.get_pretrained_cfg(name)
    names = ("fixed_input_size", "first_conv", "classifier")
    return {key: value for key in names if (value := getattr(cfg, key)) is not None}


def rebuild_model(config) -> nn.Module:
    """The model that `model_config` described, weights random; UserError if it did not."""
    try:
        return build_model(
            config["architecture"],
            config["num_classes"],
            image_size=config["pretrained_cfg"]["input_size"][-1],
            stem=config["stem"],
            dropout=config["dropout"],
            head=config.get("head", "linear"),  # older folders don't say it
            library=config["library"],
            arguments=check_arguments(config.get("model_args"), "config.json"),
        )
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise UserError(f"config.json is not one of this project's ({error!r})") from None

"""Which layer class activation maps are taken from: a network's modules that have positions.

layer = find_layer(model, images)
with GradCam(model, layer) as cam:  # of tricks/cam.py
    cams = cam(images)
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["SpatialLayer", "find_layer", "spatial_layers"]

# Pools, whose output makes no good maps: it has fewer positions, or repeats some
POOLS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
MAX_PREFIX = 16  # class, distillation and register tokens before those of the patches
MIN_REACH = 0.1  # share of a layer's positions that the logits have to depend on


class SpatialLayer(NamedTuple):
    """A module whose output has positions, and the share of them that the logits depend on."""

    name: str  # as in `named_modules`
    channels: int
    height: int
    width: int
    reach: float  # share of positions at which the largest logit has a gradient
    is_pool: bool  # whether it, or a module inside that gives its output, is a pool


def spatial_layers(model: nn.Module, images: Tensor) -> list[SpatialLayer]:
    """The modules to take maps from, in the order in which the network finishes them.

    From one forward and backward pass of the first image, in eval mode, which does not change the
    model. Listed are modules that return a tensor (n, c, h, w), or (n, h, w, c) as Swin does, or
    tokens (n, prefix + h · w, c), with h · w > 1 in the proportions of the images (n, C, H, W) and
    not larger. Of modules that return the same values, as a block and its last ReLU do, the
    outermost is listed, else the first. Left out are modules that run more than once in a pass, as
    a block's shared ReLU does, and of those that return tokens the ones of another width than the
    last and bare linear layers: a block's queries or hidden units are not its features.

    >>> model = nn.Sequential(
    ...     nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    ... )
    >>> for layer in spatial_layers(model, torch.randn(1, 3, 8, 12)):
    ...     print(*layer)
    0 4 4 6 1.0 False
    1 4 2 3 1.0 True
    """
    model = _unwrapped(model)
    _check_images(images)
    image = _like(model, images[:1])
    groups, calls, last_key, head_input = [], Counter(), None, None

    def record(name: str, module: nn.Module, args: tuple, output: object) -> None:
        nonlocal last_key, head_input
        calls[name] += 1
        if isinstance(module, nn.Linear | nn.Conv2d) and args:
            head_input = args[0]
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        grid = _grid_of(output.shape, image.shape)
        if grid is None or output.shape == image.shape:  # a normalised image is no feature
            return
        # Modules finish from the inside out: those that return the same values follow each other.
        # An in-place operation keeps the address and increments the version.
        key = (output.data_ptr(), output._version, output.numel())
        if key != last_key:
            groups.append([])
        groups[-1].append(_Member(name, module, output, grid))
        last_key = key

    with _evaluating(model), _recorded(model, record):
        # A clone is no leaf: a network may start with an in-place operation
        logits = model(image.clone().requires_grad_().clone())
        _check_logits(model, logits, 1)
        pools = [any(isinstance(member.module, POOLS) for member in group) for group in groups]
        groups = [[member for member in group if calls[member.name] == 1] for group in groups]
        entries = [
            (min(group, key=lambda member: member.name.count(".")), is_pool)
            for group, is_pool in zip(groups, pools, strict=True)
            if group
        ]
        outputs = [member.output for member, _ in entries]
        gradients = _gradients(logits.amax(), outputs)
        if head_input is not None and not any(g is not None and g.any() for g in gradients):
            # The head is zero, as new ones are: a direction in its input takes the logit's place
            direction = torch.linspace(1, 2, head_input.numel()).to(head_input)
            gradients = _gradients((head_input.flatten() * direction).sum(), outputs)

    layers, width = [], None
    for (member, is_pool), gradient in reversed(list(zip(entries, gradients, strict=True))):
        name, module, output, grid = member
        if output.ndim == 3:
            width = width or (None if isinstance(module, nn.Linear) else output.shape[2])
            if isinstance(module, nn.Linear) or output.shape[2] != width:
                continue
        reach = 0.0
        if gradient is not None:
            reach = _to_grid(gradient, grid).ne(0).any(1).float().mean().item()
        channels = _to_grid(output, grid).shape[1]
        layers.append(SpatialLayer(name, channels, grid.height, grid.width, reach, is_pool))
    return layers[::-1]


def find_layer(model: nn.Module, images: Tensor) -> str:
    """The name of the layer to take maps from: the last one with positions, before pooling.

    The last of `spatial_layers` that is not a pool and where the logits depend on at least a tenth
    of the positions. In a transformer with a class token, that is not the output of the last block:
    the head reads only its class token, and every patch has gradient zero. It is the norm before
    the last attention (torchvision's encoder.layers.encoder_layer_11.ln_1, timm's blocks.11.norm1),
    through which the patches last reach the class token.

    Raises ValueError where there is none, as in a multilayer perceptron.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    >>> find_layer(nn.Sequential(model, nn.Linear(24, 5)), torch.randn(2, 3, 6, 8))
    '0.1'
    """
    for layer in reversed(spatial_layers(model, images)):
        if layer.reach >= MIN_REACH and not layer.is_pool:
            return layer.name
    kind = type(_unwrapped(model)).__name__
    raise ValueError(f"{kind} has no layer with positions that its logits depend on: no map")


class _Grid(NamedTuple):
    """The positions in an output: h × w of them, after `prefix` tokens."""

    dim: int  # of the height: 2 in (n, c, h, w), 1 in (n, h, w, c) and (n, tokens, c)
    height: int
    width: int
    prefix: int = 0


class _Member(NamedTuple):
    name: str
    module: nn.Module
    output: Tensor
    grid: _Grid


@lru_cache
def _grid_of(shape: torch.Size, image_shape: torch.Size) -> _Grid | None:
    """The positions of an output, or None where it has none."""
    n, _, height, width = image_shape
    grids = []
    if len(shape) == 4 and shape[0] == n:
        _, dim1, dim2, dim3 = shape
        if _is_scaled((dim2, dim3), (height, width), max_loss=math.inf):
            grids.append(_Grid(2, dim2, dim3))
        if dim3 > 1 and _is_scaled((dim1, dim2), (height, width), max_loss=1):
            grids.append(_Grid(1, dim1, dim2))
    elif len(shape) == 3 and shape[0] == n:
        strides = range(1, max(height, width) + 1)
        down = [(height // stride, width // stride) for stride in strides]
        up = [(-(-height // stride), -(-width // stride)) for stride in strides]
        for h, w in down + up:
            if 0 <= shape[1] - h * w <= MAX_PREFIX:
                grids.append(_Grid(1, h, w, shape[1] - h * w))
    grids = [grid for grid in grids if grid.height * grid.width > 1]

    def misfit(grid: _Grid) -> tuple[int, float]:
        return grid.prefix, abs(math.log(grid.height * width / (grid.width * height)))

    return min(grids, key=misfit, default=None)


def _is_scaled(sides: tuple[int, int], full: tuple[int, int], max_loss: float) -> bool:
    """Whether a stride turns the image's sides into these; unpadded edges cost both the same."""
    for stride in range(1, max(full) + 1):
        losses = [full_side / stride - side for full_side, side in zip(full, sides, strict=True)]
        if min(losses) > -1 and max(losses) < max_loss and abs(losses[0] - losses[1]) < 1:
            return True
    return False


def _to_grid(output: Tensor, grid: _Grid) -> Tensor:
    """(n, channels, h, w) of an output."""
    if output.ndim == 3:
        output = output[:, grid.prefix :].unflatten(1, (grid.height, grid.width))
    return output if grid.dim == 2 else output.permute(0, 3, 1, 2)


@contextmanager
def _recorded(model: nn.Module, record: Callable[..., None]) -> Iterator[None]:
    """Call record(name, module, args, output) whenever a module of the model has run."""
    handles = []
    try:
        for name, module in model.named_modules():
            if module is not model:
                handles.append(module.register_forward_hook(partial(record, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradients(value: Tensor, outputs: list[Tensor]) -> Sequence[Tensor | None]:
    if not outputs or not value.requires_grad:
        return [None] * len(outputs)
    return torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = model._orig_mod
        else:
            return model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, uncompiled, with gradients; after it each module has its own mode again.

    Modes are set one by one: `train` and `eval` may be overridden, and also change children.
    """
    training = [module for module in model.modules() if module.training]
    is_compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    # Asking for the stance imports torch._dynamo, which takes seconds
    stance = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    try:
        for module in training:
            module.training = False
        with stance, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _like(model: nn.Module, images: Tensor) -> Tensor:
    """The images in the dtype and on the device of the model's weights, and no inference tensor."""
    images = images.detach()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            images = images.to(parameter.device, parameter.dtype)
            break
    return images.clone() if images.is_inference() else images


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(
            f"images must be floats (n, C, H, W), got {images.dtype} of {tuple(images.shape)}"
        )


def _check_logits(model: nn.Module, logits: object, n: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"{type(model).__name__} must give logits ({n}, classes), got {kind}")

"""RandAugment, TrivialAugmentWide and AutoAugment on a whole uint8 batch, a draw for each sample.

The operations, magnitudes, probabilities and signs are torchvision's (`transforms.v2`, nearest
interpolation). A draw is made on the CPU for the whole batch, from a torch.Generator or a function
(n, k) -> float64 (n, k) in [0, 1), the next k numbers of each of n samples. `apply_ops` sorts the
samples by operation and runs every operation once, on all samples that drew it:

>>> images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
>>> ops = draw_randaugment(8, 32, 32, generator=torch.Generator().manual_seed(0))
>>> apply_ops(images, ops).shape
torch.Size([8, 3, 32, 32])
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = [
    "OPERATIONS",
    "Ops",
    "apply_ops",
    "draw_autoaugment",
    "draw_randaugment",
    "draw_trivialaugment",
]

# Ops.op is an index into this tuple.
OPERATIONS = (
    "Identity",
    "ShearX",  # from here: moves pixels, a magnitude of either sign
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",  # recolours, a magnitude of either sign
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",  # recolours, no sign
    "Solarize",
    "AutoContrast",
    "Equalize",
    "Invert",  # only in AutoAugment
)
MOVES = range(1, 6)
SHIFTS = range(3, 5)
CACHED = 2**19  # pixel values that a CPU works on at once, so that they stay in its cache
FIRST_UNSIGNED = OPERATIONS.index("Posterize")
NUM_RANDAUGMENT = OPERATIONS.index("Invert")

Generator = torch.Generator | Callable[[int, int], torch.Tensor]


class Ops(NamedTuple):
    """The operations on each of n samples, in k successive slots; CPU tensors of shape (n, k).

    `op` (int64) is an index into OPERATIONS. `magnitude` (float32) is final and signed: a slope for
    Shear, pixels for Translate (the fraction is dropped), degrees counter-clockwise for Rotate,
    the change m of the factor 1 + m for Brightness, Color, Contrast and Sharpness, the bits kept
    for Posterize, the threshold as a fraction of 255 for Solarize, and 0 where there is none.

    A slice of the samples is `Ops(*(t[a:b] for t in ops))`.
    """

    op: torch.Tensor
    magnitude: torch.Tensor


@lru_cache(maxsize=32)
def _magnitudes(height: int, width: int, bins: int, wide: bool = False) -> torch.Tensor:
    """Unsigned magnitude of each operation at each level: float32 (len(OPERATIONS), bins)."""
    shear, angle, factor, bits = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
    across, down = (32.0, 32.0) if wide else (150 / 331 * width, 150 / 331 * height)
    tops = (0.0, shear, shear, across, down, angle, factor, factor, factor, factor)
    posterize = (8 - torch.arange(bins) / (max(bins - 1, 1) / bits)).round()
    solarize = torch.linspace(1.0, 0.0, bins)
    rows = [torch.linspace(0.0, top, bins) for top in tops] + [posterize, solarize]
    rows += [torch.zeros(bins)] * (len(OPERATIONS) - len(rows))
    return torch.stack(rows)


def _uniform(n: int, k: int, generator: Generator | None) -> torch.Tensor:
    """k numbers in [0, 1) for each of n samples: float64 (n, k)."""
    if callable(generator):
        return generator(n, k)
    return torch.rand(n, k, generator=generator, dtype=torch.float64)


def _with_sign(op: torch.Tensor, magnitude: torch.Tensor, uniform: torch.Tensor) -> Ops:
    """Half of the magnitudes that have a sign become negative; all of shape (n, slots)."""
    negative = (uniform < 0.5) & (op < FIRST_UNSIGNED)
    return Ops(op, torch.where(negative, -magnitude, magnitude))


def draw_randaugment(
    n: int,
    height: int,
    width: int,
    num_ops: int = 2,
    magnitude: int = 9,
    num_magnitude_bins: int = 31,
    generator: Generator | None = None,
) -> Ops:
    """RandAugment: `num_ops` of 14 operations, uniformly with replacement, at one fixed level.

    `magnitude` is a level in [0, num_magnitude_bins); images are height × width pixels, of which
    the translations are a fraction. Returns Ops of shape (n, num_ops). ValueError if the level is
    out of range. Cubuk et al. 2019, https://arxiv.org/abs/1909.13719

    >>> ops = draw_randaugment(1000, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> rotated = ops.op == OPERATIONS.index("Rotate")
    >>> sorted(set(ops.magnitude[rotated].tolist()))
    [-9.0, 9.0]
    """
    if not 0 <= magnitude < num_magnitude_bins:
        raise ValueError(f"magnitude must be in [0, {num_magnitude_bins}), got {magnitude}")
    uniform = _uniform(n, 2 * num_ops, generator)
    op = (uniform[:, :num_ops] * NUM_RANDAUGMENT).long()
    table = _magnitudes(height, width, num_magnitude_bins)
    return _with_sign(op, table[op, magnitude], uniform[:, num_ops:])


def draw_trivialaugment(
    n: int,
    height: int,
    width: int,
    num_magnitude_bins: int = 31,
    generator: Generator | None = None,
) -> Ops:
    """TrivialAugmentWide: one of 14 operations at one of `num_magnitude_bins` levels, uniformly.

    Returns Ops of shape (n, 1). Its ranges are wider than RandAugment's and its translations up to
    32 pixels whatever the image. Müller & Hutter 2021, https://arxiv.org/abs/2103.10158

    >>> ops = draw_trivialaugment(4, 32, 48, generator=torch.Generator().manual_seed(0))
    >>> ops.op.shape, bool(ops.magnitude.abs().max() <= 135)
    (torch.Size([4, 1]), True)
    """
    op, level, sign = _uniform(n, 3, generator).split(1, dim=1)
    op, level = (op * NUM_RANDAUGMENT).long(), (level * num_magnitude_bins).long()
    table = _magnitudes(height, width, num_magnitude_bins, wide=True)
    return _with_sign(op, table[op, level], sign)


# One sub-policy is two operations with their probability and level out of 10.
_POLICIES = {
    "cifar10": """
        Invert .1 0, Contrast .2 6        | Rotate .7 2, TranslateX .3 9
        Sharpness .8 1, Sharpness .9 3    | ShearY .5 8, TranslateY .7 9
        AutoContrast .5 0, Equalize .9 0  | ShearY .2 7, Posterize .3 7
        Color .4 3, Brightness .6 7       | Sharpness .3 9, Brightness .7 9
        Equalize .6 0, Equalize .5 0      | Contrast .6 7, Sharpness .6 5
        Color .7 7, TranslateX .5 8       | Equalize .3 0, AutoContrast .4 0
        TranslateY .4 3, Sharpness .2 6   | Brightness .9 6, Color .2 8
        Solarize .5 2, Invert .0 0        | Equalize .2 0, AutoContrast .6 0
        Equalize .2 0, Equalize .6 0      | Color .9 9, Equalize .6 0
        AutoContrast .8 0, Solarize .2 8  | Brightness .1 3, Color .7 0
        Solarize .4 5, AutoContrast .9 0  | TranslateY .9 9, TranslateY .7 9
        AutoContrast .9 0, Solarize .8 3  | Equalize .8 0, Invert .1 0
        TranslateY .7 9, AutoContrast .9 0""",
    "imagenet": """
        Posterize .4 8, Rotate .6 9       | Solarize .6 5, AutoContrast .6 0
        Equalize .8 0, Equalize .6 0      | Posterize .6 7, Posterize .6 6
        Equalize .4 0, Solarize .2 4      | Equalize .4 0, Rotate .8 8
        Solarize .6 3, Equalize .6 0      | Posterize .8 5, Equalize 1 0
        Rotate .2 3, Solarize .6 8        | Equalize .6 0, Posterize .4 6
        Rotate .8 8, Color .4 0           | Rotate .4 9, Equalize .6 0
        Equalize .0 0, Equalize .8 0      | Invert .6 0, Equalize 1 0
        Color .6 4, Contrast 1 8          | Rotate .8 8, Color 1 2
        Color .8 8, Solarize .8 7         | Sharpness .4 7, Invert .6 0
        ShearX .6 5, Equalize 1 0         | Color .4 0, Equalize .6 0
        Equalize .4 0, Solarize .2 4      | Solarize .6 5, AutoContrast .6 0
        Invert .6 0, Equalize 1 0         | Color .6 4, Contrast 1 8
        Equalize .8 0, Equalize .6 0""",
    "svhn": """
        ShearX .9 4, Invert .2 0          | ShearY .9 8, Invert .7 0
        Equalize .6 0, Solarize .6 6      | Invert .9 0, Equalize .6 0
        Equalize .6 0, Rotate .9 3        | ShearX .9 4, AutoContrast .8 0
        ShearY .9 8, Invert .4 0          | ShearY .9 5, Solarize .2 6
        Invert .9 0, AutoContrast .8 0    | Equalize .6 0, Rotate .9 3
        ShearX .9 4, Solarize .3 3        | ShearY .8 8, Invert .7 0
        Equalize .9 0, TranslateY .6 6    | Invert .9 0, Equalize .6 0
        Contrast .3 3, Rotate .8 4        | Invert .8 0, TranslateY .0 2
        ShearY .7 6, Solarize .4 8        | Invert .6 0, Rotate .8 4
        ShearY .3 7, TranslateX .9 3      | ShearX .1 6, Invert .6 0
        Solarize .7 2, TranslateY .6 7    | ShearY .8 4, Invert .8 0
        ShearX .7 9, TranslateY .8 3      | ShearY .8 5, AutoContrast .7 0
        ShearX .7 2, Invert .1 0""",
}


@lru_cache
def _policy(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operation, probability and level of a policy's sub-policies, each of shape (25, 2)."""
    fields = _POLICIES[name].replace(",", " ").replace("|", " ").split()
    op = torch.tensor([OPERATIONS.index(field) for field in fields[0::3]])
    probability = torch.tensor([float(field) for field in fields[1::3]])
    level = torch.tensor([int(field) for field in fields[2::3]])
    return op.view(-1, 2), probability.view(-1, 2), level.view(-1, 2)


def draw_autoaugment(
    n: int,
    height: int,
    width: int,
    policy: str = "cifar10",
    generator: Generator | None = None,
) -> Ops:
    """AutoAugment: one of the policy's 25 pairs of operations, each applied with its probability.

    `policy` is "cifar10", "imagenet" or "svhn". Returns Ops of shape (n, 2), Identity where an
    operation is not applied. ValueError for an unknown policy.
    Cubuk et al. 2018, https://arxiv.org/abs/1805.09501

    >>> draw_autoaugment(4, 32, 32, "imagenet").op.shape
    torch.Size([4, 2])
    """
    if policy not in _POLICIES:
        raise ValueError(f"policy must be one of {', '.join(_POLICIES)}, got {policy!r}")
    op, probability, level = _policy(policy)
    uniform = _uniform(n, 5, generator)
    index = (uniform[:, 0] * len(op)).long()
    applies = uniform[:, 1:3] < probability[index]
    op, level = torch.where(applies, op[index], 0), level[index]
    return _with_sign(op, _magnitudes(height, width, 10)[op, level], uniform[:, 3:])


def apply_ops(images: torch.Tensor, ops: Ops, fill: int = 0) -> torch.Tensor:
    """Apply to each image its own operations, slot after slot.

    images: uint8 (n, 1 or 3, height, width) on any device; ops: as drawn, on the CPU; fill: value
    of pixels that come from outside the image. Returns a uint8 tensor of the same shape; the input
    is not changed, and the host does not wait for the device.

    Equal to torchvision.transforms.v2.functional, image by image, bit for bit, with two exceptions.
    Torchvision multiplies its sampling grid with `bmm`: where the BLAS library behind it fuses
    multiply and add, ties between two pixels are decided differently for up to 0.04 % of the moved
    pixels. Its Contrast may differ by one level in the last 15 values of images whose number of
    values is no multiple of 16, as its vectorised loop leaves these over and rounds them otherwise.
    ValueError for another shape or dtype, and for images of 16 million pixels.

    >>> images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
    >>> op = [[OPERATIONS.index("Invert")], [OPERATIONS.index("TranslateX")]]
    >>> ops = Ops(torch.tensor(op), torch.tensor([[0.0], [1.0]]))
    >>> apply_ops(images, ops).flatten(1)
    tensor([[255, 254, 253, 252],
            [  0,   4,   0,   6]], dtype=torch.uint8)
    """
    n, channels = images.shape[:2]
    if images.dtype != torch.uint8 or images.ndim != 4 or channels not in (1, 3):
        shape = tuple(images.shape)
        raise ValueError(f"images must be uint8 (n, 1 or 3, H, W), got {images.dtype} {shape}")
    if (images.shape[2] + 2) * (images.shape[3] + 2) > 2**24:  # floats can't count further
        raise ValueError(f"images of {tuple(images.shape[2:])} pixels are too large")
    if len(ops.op) != n:
        raise ValueError(f"{n} images but a draw for {len(ops.op)}")
    sample = torch.arange(n)  # sample[i] is the number of the image now at index i of the batch
    for op, magnitude in zip(ops.op.unbind(1), ops.magnitude.unbind(1), strict=True):
        # In the order of their operations, the samples of each operation are one slice.
        order = op[sample].argsort(stable=True)
        sample = sample[order]
        images = _select(images, order)
        _apply_sorted(images, op[sample], magnitude[sample], fill)
    return _select(images, sample.argsort())


def _select(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return images.index_select(0, index.to(images.device, non_blocking=images.is_cuda))


def _apply_sorted(
    images: torch.Tensor, op: torch.Tensor, magnitude: torch.Tensor, fill: int
) -> None:
    """One operation per image, in place; `op` is sorted."""
    bounds = [0, *op.bincount(minlength=len(OPERATIONS)).cumsum(0).tolist()]
    cpu = images.device.type == "cpu"
    chunk_size = max(1, CACHED // images.shape[1:].numel() if cpu else len(images))
    kinds = (MOVES.start, SHIFTS.start, SHIFTS.stop, MOVES.stop)
    # All moves at once, unless the batch is in chunks anyway: then translations use `_shift`
    for start, stop in pairwise(kinds) if chunk_size < len(images) else [(kinds[0], kinds[-1])]:
        move = _shift if start == SHIFTS.start else _move
        for chunk in _slices(bounds[start], bounds[stop], chunk_size):
            names = [OPERATIONS[i] for i in op[chunk].tolist()]
            images[chunk] = move(images[chunk], names, magnitude[chunk].tolist(), fill)
    m = magnitude.view(-1, 1, 1, 1).to(images.device, non_blocking=images.is_cuda)
    for kind in range(MOVES.stop, len(OPERATIONS)):
        for chunk in _slices(bounds[kind], bounds[kind + 1], chunk_size):
            images[chunk] = _RECOLOUR[OPERATIONS[kind]](images[chunk], m[chunk])


def _slices(start: int, stop: int, chunk_size: int) -> list[slice]:
    return [slice(i, min(i + chunk_size, stop)) for i in range(start, stop, chunk_size)]


@lru_cache(maxsize=4096)
def _source(name: str, m: float, height: int, width: int) -> tuple[float, ...]:
    """Rows (a, b, c) of the map (x, y) -> (ax + by + c, dx + ey + f) from a pixel to its source.

    Coordinates are pixels from the image's centre; a shear keeps the top or the left edge.
    """
    # slope is m except for the last digit, as torchvision rounds it: it decides ties of two pixels.
    shear = math.radians(math.degrees(math.atan(m)))
    if name == "ShearX":
        slope = math.tan(shear)
        return 1, slope, slope * height / 2, 0, 1, 0
    if name == "ShearY":
        slope = math.sin(shear) / math.cos(shear)
        return 1, 0, 0, slope, 1, -height / 2 + slope * width / 2 + height / 2
    if name == "TranslateX":
        return 1, 0, -int(m), 0, 1, 0
    if name == "TranslateY":
        return 1, 0, 0, 0, 1, -int(m)
    angle = math.radians(m % 360)
    return math.cos(angle), -math.sin(angle), 0, math.sin(angle), math.cos(angle), 0


def _move(
    images: torch.Tensor, names: list[str], magnitudes: list[float], fill: int
) -> torch.Tensor:
    """Shear, translate or rotate each image by its own magnitude; nearest pixel, `fill` outside."""
    channels, height, width = images.shape[1:]
    maps = [_source(name, m, height, width) for name, m in zip(names, magnitudes, strict=True)]
    # Coordinates run from -1 to 1 over the image and become pixels as in grid_sample, rounding too.
    maps = torch.tensor(maps, dtype=torch.float32).view(-1, 2, 3)
    maps /= torch.tensor([width / 2, height / 2]).view(2, 1)
    a, b, c = maps.to(images.device, non_blocking=images.is_cuda)[..., None, None].unbind(2)
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device)
    across, down = (a * x + b * y.view(-1, 1)).add_(c).unbind(1)
    across.add_(1).mul_(width / 2).sub_(0.5).round_().clamp_(-1, width)
    down.add_(1).mul_(height / 2).sub_(0.5).round_().clamp_(-1, height)
    # What lies outside is taken from a frame of one pixel around the image.
    source = down.add_(1).mul_(width + 2).add_(across).add_(1).long()
    framed = F.pad(images, (1, 1, 1, 1), value=fill).flatten(2)
    source = source.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    return framed.gather(2, source).view_as(images)


def _shift(
    images: torch.Tensor, names: list[str], magnitudes: list[float], fill: int
) -> torch.Tensor:
    """`_move` for translations only, image by image: faster on a CPU."""
    outputs = torch.full_like(images, fill)
    for image, target, name, m in zip(images, outputs, names, magnitudes, strict=True):
        side = -1 if name == "TranslateX" else -2
        length = image.shape[side]
        offset = max(-length, min(length, int(m)))
        overlap = length - abs(offset)
        source = image.narrow(side, max(-offset, 0), overlap)
        target.narrow(side, max(offset, 0), overlap).copy_(source)
    return outputs


# The functions below take uint8 images (n, C, H, W) and magnitudes m (n, 1, 1, 1), and return an
# integer tensor of which the lowest 8 bits are the result.


def _levels(pixels: torch.Tensor) -> torch.Tensor:
    """Clip and drop the fraction. Float to int16 to uint8 is 4 times as fast as float to uint8."""
    return pixels.clamp_(0, 255).short()


def _blend(images: torch.Tensor, opposite: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """(1 + m) · images - m · other. addcmul fuses its multiply and add, as torchvision's does."""
    return _levels(images.float().mul_(1 + m).addcmul_(opposite, -m))


def _gray(images: torch.Tensor) -> torch.Tensor:
    """Whole luma levels, as floats (n, 1, H, W)."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _brightness(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return _levels(images.float().mul_(1 + m))


def _color(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return images if images.shape[1] == 1 else _blend(images, _gray(images), m)


def _contrast(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    gray = _gray(images)
    # Filled in for every pixel: with one number an image, addcmul takes three times as long
    return _blend(images, gray.copy_(gray.mean((1, 2, 3), keepdim=True)), m)


def _sharpness(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Blend with the mean of 3 × 3 pixels, the middle one counted five times; the border stays."""
    if min(images.shape[-2:]) <= 2:
        return images
    pixels = images.float()
    inner = pixels[:, :, 1:-1, 1:-1]
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    # Thirteenths are never halfway between two integers: any way to sum them rounds alike.
    smooth = box.add_(inner, alpha=4).div_(13).round_()
    inner.addcmul_(smooth.sub_(inner), -m)
    return _levels(pixels)


def _posterize(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return images & (255 << (8 - m.int())).to(torch.uint8)  # its lowest 8 bits


def _solarize(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    bright = images >= (255 * m).ceil().to(torch.uint8)
    return images ^ -bright.to(torch.uint8)  # -1 is 255: all bits flip


def _autocontrast(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Stretch each channel to 0..255; a channel of one value stays."""
    low = images.amin((2, 3), keepdim=True).float()
    span = (images.amax((2, 3), keepdim=True) - low).mul_(1 / 255)
    flat = span == 0
    stretched = images.float().sub_(low.masked_fill_(flat, 0)).div_(span.masked_fill_(flat, 1))
    return _levels(stretched)


def _equalize(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Flatten each channel's histogram with Pillow's integer arithmetic."""
    pixels = images.flatten(2).long()
    ones = torch.ones((), dtype=torch.int32, device=images.device).expand_as(pixels)
    count = ones.new_zeros(*pixels.shape[:2], 256).scatter_add_(2, pixels, ones)
    darker = count.cumsum(2, dtype=torch.int32) - count
    below_brightest = torch.where(count > 0, darker, 0).amax(2, keepdim=True)
    step = below_brightest.div_(255, rounding_mode="floor")
    level = (darker + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    unchanged = torch.arange(256, dtype=torch.int32, device=images.device)
    level = torch.where(step == 0, unchanged, level).to(torch.uint8)
    return level.gather(2, pixels).view_as(images)


def _invert(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return ~images


_RECOLOUR = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
}

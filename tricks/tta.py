"""Test-time augmentation: the same images seen in several ways, and one prediction from all.

    views = tta_views("flip", size=32)
    logits = torch.stack([model(normalize(view.apply(images, index))) for view in views])
    log_probabilities = average_views(logits, [view.weight for view in views])

Ten crops: Krizhevsky et al., 2012, https://doi.org/10.1145/3065386, section 4.1
Six shifted views: Keller Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024,
https://arxiv.org/abs/2404.00498
"""

import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["View", "average_views", "tta_views"]

MOST_RANDOM = 1000  # views: each is one more evaluation of all images
EXAMPLES = ("none", "flip", "shift", "crops:5", "crops:10", "random:8")
SCALE, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)  # of random views: share of the area, width / height


class View(NamedTuple):
    """One way to see a batch: `apply(images, index)` gives (n, C, size, size) of the same dtype.

    images: uint8 or float (n, C, H, W), on any device; index: int64 (n,), on the CPU, the number of
    each sample in its data set. Only random views use it.
    """

    name: str
    weight: float
    apply: Callable[[Tensor, Tensor], Tensor]


def tta_views(kind: str, size: int, seed: int = 0) -> list[View]:
    """The views of a kind, for networks that take images of size × size; their weights sum to 1.

    Images have sides of at least `size`; of larger ones, the central square is used.

    - "none": the central square.
    - "flip": the central square and its mirror image.
    - "shift": airbench's six: the views of "flip" (¼ each), and both moved by 1 pixel down and
      right, and up and left, reflected at the edge (⅛ each).
    - "crops:N": N of centre, upper left, upper right, lower left and lower right, in this order,
      N = 1 to 5; all of them and their mirror images for 10. Corners are those of the image; along
      a side of exactly `size`, of the image with an eighth of `size` reflected at both ends.
    - "random:N": N random resized crops of every image, each mirrored or not: a share of the area
      uniform in 0.35 to 1, a width/height log-uniform in ¾ to 4/3, sides cut to the image's;
      bilinear, antialiased. A sample's crop depends only on (seed, view, its index): it is
      the same in every batch, order and process, and on every device.

    Mirroring is for pictures in which left and right don't matter: not for digits or text.

    Raises ValueError, with the nearest name, for an unknown kind, and for `size` < 1. A view raises
    it for images smaller than `size`, and for images too small to be reflected.

    >>> [(view.name, view.weight) for view in tta_views("flip", size=2)]
    [('centre', 0.5), ('centre, mirrored', 0.5)]
    >>> images, index = torch.tensor([[1, 2], [3, 4]]).view(1, 1, 2, 2), torch.tensor([0])
    >>> for view in tta_views("shift", size=2)[::2]:
    ...     print(view.name, view.weight, view.apply(images, index).tolist())
    centre 0.25 [[[[1, 2], [3, 4]]]]
    down right 0.125 [[[[4, 3], [2, 1]]]]
    up left 0.125 [[[[4, 3], [2, 1]]]]
    """
    if size < 1:
        raise ValueError(f"size must be ≥ 1, got {size}")
    name, _, number = kind.partition(":")
    count = int(number) if number.isascii() and number.isdecimal() else None
    if kind == "none":
        return [_fixed_view("centre", 1.0, size)]
    if kind == "flip":
        return _with_mirrored([_fixed_view("centre", 1.0, size)])
    if kind == "shift":
        shifted_views = [
            View("down right", 0.25, partial(_moved, size, 1, 1)),
            View("up left", 0.25, partial(_moved, size, -1, -1)),
        ]
        return _with_mirrored([_fixed_view("centre", 0.5, size), *shifted_views])
    if name == "crops" and count is not None:
        if count not in (1, 2, 3, 4, 5, 10):
            raise ValueError(f"crops are 1 to 5, or 10, got {kind!r}")
        n = min(count, 5)
        positions = ["centre", "upper left", "upper right", "lower left", "lower right"]
        views = [_fixed_view(position, 1 / n, size) for position in positions[:n]]
        return _with_mirrored(views) if count == 10 else views
    if name == "random" and count is not None:
        if not 1 <= count <= MOST_RANDOM:
            raise ValueError(f"random views are 1 to {MOST_RANDOM}, got {kind!r}")
        return [
            View(f"random {number}", 1 / count, partial(_random_crop, size, seed, number))
            for number in range(count)
        ]
    matches = difflib.get_close_matches(kind, EXAMPLES, n=1, cutoff=0.5)
    hint = f"did you mean {matches[0]!r}?" if matches else "none, flip, shift, crops:N or random:N"
    raise ValueError(f"no views are named {kind!r}; {hint}")


def average_views(
    logits: Tensor, weights: Sequence[float] | None = None, check: bool = True
) -> Tensor:
    """The logarithm of the views' mean probabilities: float64 (samples, classes); float32 on MPS.

        log Σ wᵥ · softmax(logitsᵥ)

    logits: (views, samples, classes), float of any precision; weights: one a view, ≥ 0, with the
    sum 1, as in `View.weight`; None for equal ones. The result can be used as logits, for an
    ensemble or a temperature. Raises ValueError for logits that are not finite, with the view's
    number, and for invalid weights. check=False does not test the logits, so that the host need not
    wait for a GPU: where some are NaN, so is the mean.

    >>> logits = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]]).log()
    >>> average_views(logits).exp()
    tensor([[0.6000, 0.4000]], dtype=torch.float64)
    """
    if logits.ndim != 3 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(
            "logits must be floats of shape (views, samples, classes), got "
            f"{logits.dtype} of {tuple(logits.shape)}"
        )
    shares = [1 / len(logits)] * len(logits) if weights is None else list(weights)
    if len(shares) != len(logits):
        raise ValueError(f"{len(logits)} views need as many weights, got {shares}")
    if not all(share >= 0 for share in shares) or not abs(sum(shares) - 1) <= 1e-5:
        raise ValueError(f"weights must be ≥ 0 with the sum 1, got {shares}")
    precision = (
        torch.float32 if logits.device.type == "mps" else torch.float64
    )  # MPS has no float64
    total = None
    for number, (share, view) in enumerate(zip(shares, logits, strict=True)):
        if check and not view.isfinite().all():
            raise ValueError(f"the logits of view {number} are not finite")
        if share:
            log_share = view.to(precision).log_softmax(1) + math.log(share / sum(shares))
            total = log_share if total is None else torch.logaddexp(total, log_share)
    return total


def _fixed_view(position: str, weight: float, size: int) -> View:
    return View(position, weight, partial(_crop, size, position))


def _with_mirrored(views: list[View]) -> list[View]:
    pairs = []
    for name, weight, apply in views:
        pairs.append(View(name, weight / 2, apply))
        pairs.append(View(f"{name}, mirrored", weight / 2, partial(_mirrored, apply)))
    return pairs


def _mirrored(apply: Callable[[Tensor, Tensor], Tensor], images: Tensor, index: Tensor) -> Tensor:
    return apply(images, index).flip(-1)


def _crop(size: int, position: str, images: Tensor, index: Tensor) -> Tensor:
    vertical, _, horizontal = position.partition(" ")
    top = _start(images.shape[2], size, vertical, "upper", "lower")
    left = _start(images.shape[3], size, horizontal, "left", "right")
    return _window(images, top, left, size, size)


def _start(side: int, size: int, position: str, low: str, high: str) -> int:
    """The first pixel of a crop along a side; negative if the crop starts before the image."""
    if side < size:
        raise ValueError(f"views of size {size} need images as large, got a side of {side}")
    margin = max(1, size // 8) if side == size else 0
    centre = round((side - size) / 2)  # as torchvision's center_crop
    return {low: -margin, high: side - size + margin}.get(position, centre)


def _moved(size: int, down: int, right: int, images: Tensor, index: Tensor) -> Tensor:
    return _window(_crop(size, "centre", images, index), -down, -right, size, size)


def _window(images: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """images[:, :, top:, left:] of a height and width, reflected beyond the edges.

    F.pad does not reflect uint8.
    """
    for dim, start, length in ((2, top, height), (3, left, width)):
        side = images.shape[dim]
        overhang = max(-start, start + length - side)
        if overhang >= side:
            raise ValueError(f"a side of {side} is too small to reflect {overhang} pixels")
        if overhang <= 0:
            images = images.narrow(dim, start, length)
        else:
            position = torch.arange(start, start + length, device=images.device).abs()
            images = images.index_select(dim, torch.minimum(position, 2 * (side - 1) - position))
    return images


def _random_crop(size: int, seed: int, view: int, images: Tensor, index: Tensor) -> Tensor:
    height, width = images.shape[2:]
    if min(height, width) < size:
        raise ValueError(f"views of size {size} need images as large, got {height}×{width}")
    if index.shape != images.shape[:1] or index.dtype != torch.int64:
        raise ValueError(
            f"index must be int64 of shape ({len(images)},), got {index.dtype} of "
            f"{tuple(index.shape)}"
        )
    boxes, flips = _draw_boxes(seed, view, index, height, width)
    top, left, h, w, flips = (
        t.to(images.device, non_blocking=images.is_cuda) for t in (*boxes.unbind(1), flips)
    )
    vertical = _resize_weights(top, h, height, size)
    horizontal = _resize_weights(left, w, width, size)
    horizontal = torch.where(flips.view(-1, 1, 1), horizontal.flip(1), horizontal)
    with torch.autocast(images.device.type, enabled=False):  # else products in 16 bits
        resized = vertical.unsqueeze(1) @ (images.float() @ horizontal.mT.unsqueeze(1))
    return resized.to(images.dtype) if images.is_floating_point() else _rounded(resized, images)


def _draw_boxes(
    seed: int, view: int, index: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Each sample's box (top, left, height, width), int64 (n, 4), and whether it is mirrored."""
    area, ratio, down, right, coin = _uniforms(seed, view, index, 5)
    area = height * width * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = (low + ratio * (high - low)).exp()
    h = (area / ratio).sqrt().round().long().clamp(1, height)
    w = (area * ratio).sqrt().round().long().clamp(1, width)
    top, left = (down * (height - h + 1)).long(), (right * (width - w + 1)).long()
    return torch.stack((top, left, h, w), dim=1), coin < 0.5


def _rounded(resized: Tensor, images: Tensor) -> Tensor:
    # a sum of weights may exceed 1, and 255, by rounding
    limits = torch.iinfo(images.dtype)
    return resized.round_().clamp_(limits.min, limits.max).to(images.dtype)


def _resize_weights(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """Antialiased bilinear weights (n, size, full) from source to target pixels along one side.

    A triangle around each target pixel's centre in the source, as wide as one target pixel (at
    least one source pixel) to either side, cut off at the box [start, start + length).
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    source = torch.arange(full, device=start.device) - start
    target = torch.arange(size, device=start.device).view(-1, 1)
    step = length / size
    distance = (source + 0.5 - step * (target + 0.5)).abs()
    weight = (1 - distance / step.clamp(min=1)).clamp(min=0) * ((source >= 0) & (source < length))
    return weight / weight.sum(2, keepdim=True)


def _uniforms(seed: int, view: int, index: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each sample, a function of (seed, view, index): (count, n).

    SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2714064.2660195): a generator for each
    sample would take longer to seed than a batch to crop.
    """
    key = torch.tensor(_signed(seed))
    for counter in (torch.tensor(view), index, torch.arange(count).view(-1, 1)):
        key = _mix(key + (counter + 1) * GAMMA)
    return ((key >> 11) & (2**53 - 1)).double() / 2**53


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output of a state; int64 wraps around as uint64 does."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64's own shift would copy the sign bit


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of a number."""
    return (value + 2**63) % 2**64 - 2**63


GAMMA = _signed(0x9E3779B97F4A7C15)

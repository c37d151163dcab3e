"""Crop, flip, resized crop, erase and normalise whole batches, each sample with its own draw.

Random numbers are drawn on the CPU for the whole batch (`draw_*`), can be sliced by sample, and are
then applied on the device of the images (`*_batch`), for which the host does not wait. No function
changes its input. Images are (n, channels, height, width), uint8 until `normalize_batch`.

A draw's `generator` is a torch.Generator, or a function (n, k) -> float64 (n, k) in [0, 1), the
next k numbers of each of n samples: for samples whose draws must not depend on their neighbours'.

>>> images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
>>> generator = torch.Generator().manual_seed(0)
>>> images = crop_batch(images, draw_crops(8, 4, generator), 4)
>>> images = flip_batch(images, draw_flips(8, generator=generator))
>>> images = normalize_batch(images, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
>>> erase_batch(images, draw_erasing(8, 32, 32, generator=generator)).shape
torch.Size([8, 3, 32, 32])
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

__all__ = [
    "alternate_flips",
    "crop_batch",
    "draw_crops",
    "draw_erasing",
    "draw_flips",
    "draw_resized_crops",
    "erase_batch",
    "flip_batch",
    "normalize_batch",
    "resized_crop_batch",
]

CACHED = 2**19  # pixel values that a CPU processes at once, so that they stay in its cache
TRIES = 10  # boxes drawn before giving up, as in torchvision

Generator = torch.Generator | Callable[[int, int], torch.Tensor]


def _uniform(n: int, k: int, generator: Generator | None) -> torch.Tensor:
    """k numbers in [0, 1) for each of n samples: float64 (n, k)."""
    if callable(generator):
        return generator(n, k)
    return torch.rand(n, k, generator=generator, dtype=torch.float64)


def _select(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tensor.index_select(0, index.to(tensor.device, non_blocking=tensor.is_cuda))


def draw_crops(n: int, padding: int, generator: Generator | None = None) -> torch.Tensor:
    """Top and left of n crops in images padded by `padding`: int64 (n, 2), 0 to 2 · padding.

    >>> draw_crops(100, 4, torch.Generator().manual_seed(0)).unique().tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """
    return (_uniform(n, 2, generator) * (2 * padding + 1)).long()


def crop_batch(
    images: torch.Tensor, offsets: torch.Tensor, padding: int, fill: int = 0
) -> torch.Tensor:
    """Pad each side with `padding` pixels of `fill`, and cut each image out at its own offset.

    images: uint8 (n, C, H, W); offsets: int64 (n, 2) as from `draw_crops`, on the CPU. Returns the
    same shape: images[i, :, y, x] comes from (y + offsets[i, 0] - padding, x + offsets[i, 1] -
    padding). Equal to torchvision's RandomCrop((H, W), padding) at the same offset. ValueError for
    an offset outside of 0 to 2 · padding.

    >>> crop_batch(torch.arange(1, 5).view(1, 1, 2, 2), torch.tensor([[0, 1]]), 1).view(2, 2)
    tensor([[0, 0],
            [1, 2]])
    """
    n, channels, height, width = images.shape
    if not n:
        return images.clone()
    low, high = (bound.item() for bound in offsets.aminmax())
    if not 0 <= low <= high <= 2 * padding:
        raise ValueError(f"offsets must be from 0 to {2 * padding}, got {low} to {high}")
    padded = F.pad(images, (padding,) * 4, value=fill)
    # Every run of `width` pixels of the padded batch is a row of this view; a crop takes C × H.
    rows = padded.flatten().unfold(0, width, 1)
    padded_height, padded_width = padded.shape[2:]
    first_row = torch.arange(n) * channels * padded_height + offsets[:, 0]
    start = first_row * padded_width + offsets[:, 1]
    channel = torch.arange(channels).view(-1, 1) * padded_height * padded_width
    row = start.view(-1, 1, 1) + channel + torch.arange(height) * padded_width
    return _select(rows, row.flatten()).view_as(images)


def draw_flips(n: int, p: float = 0.5, generator: Generator | None = None) -> torch.Tensor:
    """Whether to mirror each of n images, with probability p: bool (n,).

    >>> draw_flips(1000, 0.5, torch.Generator().manual_seed(0)).float().mean().round(decimals=1)
    tensor(0.5000)
    """
    return _uniform(n, 1, generator).squeeze(1) < p


def alternate_flips(first: torch.Tensor, epoch: int) -> torch.Tensor:
    """Whether to mirror each image in `epoch`, counted from 0: as in the first one, then in turns.

    first: bool (n,), drawn once for every image of the data set (`draw_flips`), in the order of the
    batch. In any two successive epochs every image is seen both ways, while independent draws show
    half of them the same way twice. Keller Jordan 2024, https://arxiv.org/abs/2404.00498

    >>> first = torch.tensor([True, False])
    >>> [alternate_flips(first, epoch).tolist() for epoch in range(3)]
    [[True, False], [False, True], [True, False]]
    """
    return first ^ bool(epoch % 2)


def flip_batch(images: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Mirror left and right where flips, bool (n,) on the CPU, is true; images (n, C, H, W).

    Raises ValueError unless there is one flip for each image.

    >>> flip_batch(torch.tensor([[1, 2], [3, 4]]).view(2, 1, 1, 2), torch.tensor([True, False]))
    tensor([[[[2, 1]]],
    <BLANKLINE>
    <BLANKLINE>
            [[[3, 4]]]])
    """
    n = len(images)
    if flips.shape != (n,):
        raise ValueError(f"{n} images need flips ({n},), got {tuple(flips.shape)}")
    return _select(torch.cat((images, images.flip(-1))), torch.arange(n) + n * flips)


def _draw_sides(
    uniform: torch.Tensor,
    area: int | torch.Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole sides √(a·r), √(a/r) of (n, TRIES) boxes: a uniform in scale·area, r log-uniform.

    uniform: (n, 2 · TRIES) numbers in [0, 1). area: one for all images, or (n, 1).
    """
    if not 0 <= scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be 0 <= low <= high <= 1, got {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio must be 0 < low <= high, got {ratio}")
    u, v = uniform.split(TRIES, dim=1)
    boxes = area * (scale[0] + u * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = (low + v * (high - low)).exp()
    return (boxes * ratios).sqrt().round().long(), (boxes / ratios).sqrt().round().long()


def _boxes_at(
    sides: torch.Tensor, image_sides: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Boxes (top, left, height, width) of given sides (n, 2) anywhere inside images: int64 (n, 4).

    uniform: (n, 2) numbers in [0, 1).
    """
    return torch.cat(((uniform * (image_sides - sides + 1)).long(), sides), dim=1)


def draw_resized_crops(
    n: int,
    height: int | torch.Tensor,
    width: int | torch.Tensor,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: Generator | None = None,
) -> torch.Tensor:
    """Boxes to crop from images of height × width: int64 (n, 4), top, left, height, width.

    height, width: px, the same for all images, or int64 (n,). A box has a share of
    the image's area uniform in `scale` and a width/height log-uniform in `ratio`, and lies anywhere
    inside. If ten boxes in a row don't fit, it is the largest central one of an allowed ratio. The
    distribution is that of torchvision's RandomResizedCrop. ValueError for an invalid range.
    Szegedy et al. 2014, https://arxiv.org/abs/1409.4842

    >>> draw_resized_crops(2, 32, 48, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 4])
    >>> draw_resized_crops(1, 10, 40, scale=(1, 1))  # no box of the whole area fits
    tensor([[ 0, 13, 10, 13]])
    """
    uniform = _uniform(n, 2 * TRIES + 2, generator)
    sides = [torch.as_tensor(side).expand(n) for side in (height, width)]
    image_sides = torch.stack(sides, dim=1)
    tall, wide = image_sides.split(1, dim=1)
    across, down = _draw_sides(uniform[:, :-2], tall * wide, scale, ratio)
    fits = (across > 0) & (across <= wide) & (down > 0) & (down <= tall)
    first_fit = fits.long().argmax(1, keepdim=True)
    sides = torch.cat((down.gather(1, first_fit), across.gather(1, first_fit)), dim=1)
    boxes = _boxes_at(sides, image_sides, uniform[:, -2:])
    h = torch.minimum(tall, (wide.double() / ratio[0]).round().long())
    w = torch.minimum(wide, (tall.double() * ratio[1]).round().long())
    central = torch.cat(((tall - h) // 2, (wide - w) // 2, h, w), dim=1)
    return torch.where(fits.any(1, keepdim=True), boxes, central)


def _resize_weights(
    start: torch.Tensor, length: torch.Tensor, full: int, size: int
) -> torch.Tensor:
    """Antialiased bilinear weights (n, size, full) from source to target pixels along one side.

    start, length: whole numbers (n,), as floats of the precision to compute in. A triangle
    around each target pixel's centre in the source, as wide as one target pixel (at least one
    source pixel) to either side, cut off at the box [start, start + length).
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    source = torch.arange(full, device=start.device) - start
    target = torch.arange(size, device=start.device).view(-1, 1)
    step = length / size
    distance = (source + 0.5 - step * (target + 0.5)).abs_()
    weight = distance.div_(-step.clamp(min=1)).add_(1).clamp_(min=0)
    weight.mul_((source >= 0) & (source < length))
    return weight.div_(weight.sum(2, keepdim=True))


def resized_crop_batch(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Crop each image to its own box and resize it to size × size: bilinear, antialiased.

    images: uint8 or floating point (n, C, H, W); boxes: int64 (n, 4) as from `draw_resized_crops`,
    on the CPU. Returns (n, C, size, size) of the images' dtype: uint8 rounded, floats computed in
    float32 at least. ValueError for another dtype, and for a box that is empty or not inside.

    On a CPU each image goes through torch's own uint8 kernel, and the result is that of
    torchvision's resized_crop(antialias=True). Elsewhere it is two matrix products an image for the
    whole batch, one down and one across: equal to interpolating in float32 and rounding, except for
    values halfway between two levels. The CPU's kernel rounds twice: the two results are within 1
    level of each other, also where matrix products may use TF32.

    >>> image = torch.tensor([[0, 0, 100, 200]] * 4, dtype=torch.uint8).view(1, 1, 4, 4)
    >>> resized_crop_batch(image, torch.tensor([[1, 2, 2, 2]]), 2).view(2, 2)
    tensor([[100, 200],
            [100, 200]], dtype=torch.uint8)
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    fits = boxes[:, :2] + boxes[:, 2:] <= torch.tensor(images.shape[2:])
    if not (fits.all() and (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()):
        raise ValueError(f"a box is empty or not inside the images, {tuple(images.shape[2:])}")
    if images.device.type == "cpu":
        return _resize_each(images, boxes, size)
    return _resize_at_once(images, boxes, size)


def _resize_each(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    resized = images.new_empty((*images.shape[:2], size, size))
    if images.dtype in (torch.float16, torch.bfloat16):  # they have no kernel
        images = images.float()
    for index, (top, left, h, w) in enumerate(boxes.tolist()):
        box = images[index : index + 1, :, top : top + h, left : left + w]
        resized[index] = F.interpolate(box, (size, size), mode="bilinear", antialias=True)[0]
    return resized


def _resize_at_once(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    height, width = images.shape[-2:]
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    boxes = boxes.to(images.device, dtype, non_blocking=images.is_cuda)
    top, left, h, w = boxes.unbind(1)
    down = _resize_weights(top, h, height, size)
    across = _resize_weights(left, w, width, size)
    with torch.autocast(images.device.type, enabled=False):  # else products in 16 bits
        resized = down.unsqueeze(1) @ (images.to(dtype) @ across.mT.unsqueeze(1))
    return resized.to(images.dtype) if images.is_floating_point() else resized.round_().byte()


def draw_erasing(
    n: int,
    height: int,
    width: int,
    p: float = 0.25,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    generator: Generator | None = None,
) -> torch.Tensor:
    """Boxes to erase from images of height × width: int64 (n, 4), top, left, height, width.

    With probability p a box with a share of the area uniform in `scale` and a height/width
    log-uniform in `ratio`, otherwise (or when ten boxes in a row don't fit) one of area 0. The
    distribution is that of torchvision's RandomErasing. ValueError for an invalid range.
    Zhong et al. 2017, https://arxiv.org/abs/1708.04896

    >>> boxes = draw_erasing(1000, 32, 48, generator=torch.Generator().manual_seed(0))
    >>> boxes.shape, 0.2 < (boxes[:, 2] > 0).float().mean() < 0.3
    (torch.Size([1000, 4]), tensor(True))
    """
    uniform = _uniform(n, 1 + 2 * TRIES + 2, generator)
    erases = uniform[:, :1] < p
    down, across = _draw_sides(uniform[:, 1:-2], height * width, scale, ratio)
    fits = (down < height) & (across < width)
    first_fit = fits.long().argmax(1, keepdim=True)
    sides = torch.cat((down.gather(1, first_fit), across.gather(1, first_fit)), dim=1)
    boxes = _boxes_at(sides, torch.tensor([height, width]), uniform[:, -2:])
    return torch.where(erases & fits.any(1, keepdim=True), boxes, 0)


def erase_batch(images: torch.Tensor, boxes: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    """Set each image's box to `value` in all channels.

    images: (n, C, H, W) of any dtype, whose memory format is kept; boxes: int64 (n, 4) as from
    `draw_erasing`, on the CPU. The part of a box outside its image is ignored. Erased pixels have a
    gradient of 0. After `normalize_batch` the value 0 is the mean colour.

    >>> erase_batch(torch.ones(1, 1, 2, 3), torch.tensor([[0, 1, 2, 1]])).view(2, 3)
    tensor([[1., 0., 1.],
            [1., 0., 1.]])
    """
    erase = _erase_each if images.device.type == "cpu" else _erase_at_once
    return erase(images.clone(), boxes, value)


def _erase_each(images: torch.Tensor, boxes: torch.Tensor, value: float) -> torch.Tensor:
    boxes = torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1).clamp(min=0)
    for index, (top, left, bottom, right) in enumerate(boxes.tolist()):
        if top < bottom and left < right:
            images[index, :, top:bottom, left:right] = value  # iterating fails with gradients
    return images


def _erase_at_once(images: torch.Tensor, boxes: torch.Tensor, value: float) -> torch.Tensor:
    index = (boxes[:, 2] * boxes[:, 3]).nonzero().squeeze(1)
    top, left, height, width = boxes[index].view(-1, 4, 1).unbind(1)
    y, x = torch.arange(images.shape[2]), torch.arange(images.shape[3])
    rows = (y >= top) & (y < top + height)
    columns = (x >= left) & (x < left + width)
    index, rows, columns = (
        t.to(images.device, non_blocking=images.is_cuda) for t in (index, rows, columns)
    )
    mask = rows[:, None, :, None] & columns[:, None, None, :]
    images[index] = images[index].masked_fill_(mask, value)
    return images


def normalize_batch(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(images / 255 - mean) / std, per channel, in channels_last memory format.

    images: uint8 (n, C, H, W); mean and std: one number a channel, for values from 0 to 1. It is
    computed in float32 and then rounded to `dtype`. ValueError if a std is not positive, and for
    images that are not uint8.

    >>> normalize_batch(torch.full((1, 1, 1, 1), 51, dtype=torch.uint8), [0.5], [0.1]).item()
    -3.0
    """
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {tuple(std)}")
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    # One multiply and one subtract: x / (255 std) - mean / std.
    factor = torch.tensor([[1 / (255 * s)] for s in std], dtype=torch.float32).unsqueeze(2)
    shift = torch.tensor([[m / s] for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    factor, shift = (
        t.to(images.device, non_blocking=images.is_cuda) for t in (factor, shift.unsqueeze(2))
    )
    normalized = torch.empty_like(images, dtype=dtype, memory_format=torch.channels_last)
    cpu = images.device.type == "cpu"
    chunk_size = max(1, CACHED // images.shape[1:].numel() if cpu else len(images))
    for chunk, target in zip(images.split(chunk_size), normalized.split(chunk_size), strict=True):
        target.copy_(chunk.float().mul_(factor).sub_(shift))
    return normalized

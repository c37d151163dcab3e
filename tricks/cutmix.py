"""CutMix: paste a box of one image into another and mix the labels by area.

Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
Features", ICCV 2019, https://arxiv.org/abs/1905.04899
"""

import math

import torch
from torch import Tensor

__all__ = ["Box", "box_around", "cutmix_batch", "draw_cutmix"]

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels


def draw_cutmix(
    alpha: float, height: int, width: int, generator: torch.Generator | None = None
) -> tuple[Box, float]:
    """Draw the box that one batch of `height` × `width` images exchanges, and the share it leaves.

    λ₀ ~ Beta(α, α); the box has sides √(1 - λ₀) of the image's and a centre drawn uniformly from
    the pixels, and is clipped to the image. Returns the box and λ = 1 - box area / image area: the
    share that an image keeps after rounding and clipping, not λ₀. The draws are made on the CPU,
    from `generator` if given. The paper uses α = 1 (λ₀ uniform).

    Raises ValueError unless α is positive and finite and both sides are at least 1.

    >>> (top, left, height, width), lam = draw_cutmix(1.0, 32, 48, torch.Generator().manual_seed(0))
    >>> top + height <= 32 and left + width <= 48 and lam == 1 - height * width / (32 * 48)
    True
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"CutMix's alpha must be positive and finite, got {alpha}")
    if height < 1 or width < 1:
        raise ValueError(f"an image has at least one pixel, got {height}×{width}")
    # Beta(α, α) = G₁ / (G₁ + G₂) with G ~ Gamma(α), and Gamma(α) = Gamma(α + 1) · U^(1/α).
    # Taken in logarithms, because for a small α both gammas would underflow to 0.
    shape = torch.full((2,), alpha + 1.0, dtype=torch.float64)
    # torch.distributions takes no generator
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = torch.rand(2, dtype=torch.float64, generator=generator)
    log_gamma_1, log_gamma_2 = gamma.log() + uniform.log() / alpha
    lam = torch.sigmoid(log_gamma_1 - log_gamma_2).item()

    row = int(torch.randint(height, (), generator=generator))
    column = int(torch.randint(width, (), generator=generator))
    box = box_around(row, column, lam, height, width)
    return box, _remaining_share(box, height, width)


def box_around(row: int, column: int, lam: float, height: int, width: int) -> Box:
    """The box around pixel (row, column) with sides √(1 - λ) of the image's, clipped to it.

    Sides are rounded to whole pixels; an even side has one pixel more before the centre than
    after it. Returns (top, left, height, width).

    >>> box_around(16, 24, 0.75, height=32, width=48)
    (8, 12, 16, 24)
    >>> box_around(0, 47, 0.75, height=32, width=48)
    (0, 35, 8, 13)
    """
    side = math.sqrt(1 - lam)
    box_height, box_width = round(side * height), round(side * width)
    first_row, first_column = row - box_height // 2, column - box_width // 2
    top, bottom = max(first_row, 0), min(first_row + box_height, height)
    left, right = max(first_column, 0), min(first_column + box_width, width)
    return top, left, bottom - top, right - left


def cutmix_batch(
    images: Tensor, targets: Tensor, box: Box, permutation: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Paste the box of image p(i) into image i and mix the targets: λ·tᵢ + (1 - λ)·tₚ₍ᵢ₎.

    `images` (N, C, H, W) are of any dtype, `targets` (N, K), one-hot or soft, floating point;
    `permutation` (N,) is int64 with values in [0, N), on any device; `box` is (top, left, height,
    width) and lies in the image. Returns new images and targets, of the same dtype and memory
    format, and λ = 1 - box area / (H·W), counted from the box that was pasted.

    Raises ValueError for a box outside the image, integer targets, and shapes that don't fit.

    >>> images = torch.tensor([0, 1]).view(2, 1, 1, 1).expand(2, 1, 2, 3)
    >>> pasted, soft, lam = cutmix_batch(images, torch.eye(2), (1, 0, 1, 3), torch.tensor([1, 0]))
    >>> pasted[0, 0].tolist()
    [[0, 0, 0], [1, 1, 1]]
    >>> soft.tolist(), lam
    ([[0.5, 0.5], [0.5, 0.5]], 0.5)
    """
    n, _, height, width = images.shape
    top, left, box_height, box_width = box
    if min(box) < 0 or top + box_height > height or left + box_width > width:
        raise ValueError(f"box {box} (top, left, height, width) leaves the {height}×{width} image")
    if not targets.is_floating_point():
        raise ValueError(f"CutMix mixes one-hot or soft targets, got {targets.dtype}")
    if targets.ndim != 2 or len(targets) != n or permutation.shape != (n,):
        raise ValueError(
            f"{n} images need targets ({n}, classes) and a permutation ({n},), "
            f"got {tuple(targets.shape)} and {tuple(permutation.shape)}"
        )
    partner = permutation.to(images.device, non_blocking=images.is_cuda)
    pasted = images.clone()
    # index_select is fast along memory: channels go last where the memory format has them last
    region = (..., slice(top, top + box_height), slice(left, left + box_width))
    source, target = images[region], pasted[region]
    if images.is_contiguous(memory_format=torch.channels_last):
        source, target = source.permute(0, 2, 3, 1), target.permute(0, 2, 3, 1)
    target.copy_(source.index_select(0, partner))
    lam = _remaining_share(box, height, width)
    return pasted, targets[partner].lerp_(targets, lam), lam


def _remaining_share(box: Box, height: int, width: int) -> float:
    """The share of the image outside the box."""
    return 1 - box[2] * box[3] / (height * width)

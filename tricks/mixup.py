"""mixup: train on blends of two images and of their labels.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, https://arxiv.org/abs/1710.09412
"""

import math

import torch
from torch import Tensor

__all__ = ["draw_mixup", "mixup_batch", "neighbour_pairs"]


def draw_mixup(alpha: float, generator: torch.Generator | None = None) -> float:
    """Draw the share λ that every image of one batch keeps: λ ~ Beta(α, α), in [0, 1].

    α = 1 is uniform; a smaller α draws nearer to 0 and 1, so that most blends are faint. The
    draw is made on the CPU, from `generator` if given.

    Raises ValueError unless α is positive and finite.

    >>> lam = draw_mixup(0.2, torch.Generator().manual_seed(0))
    >>> 0.0 <= lam <= 1.0
    True
    >>> lam == draw_mixup(0.2, torch.Generator().manual_seed(0))
    True
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"mixup's alpha must be positive and finite, got {alpha}")
    # Beta(α, α) = G₁ / (G₁ + G₂) with G ~ Gamma(α), and Gamma(α) = Gamma(α + 1) · U^(1/α).
    # Taken in logarithms, because for a small α both gammas would underflow to 0.
    shape = torch.full((2,), alpha + 1.0, dtype=torch.float64)
    # torch.distributions takes no generator
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = torch.rand(2, dtype=torch.float64, generator=generator)
    log_gamma_1, log_gamma_2 = gamma.log() + uniform.log() / alpha
    return torch.sigmoid(log_gamma_1 - log_gamma_2).item()


def neighbour_pairs(n: int) -> Tensor:
    """Pair each sample of a batch with its neighbour: 2k with 2k + 1.

    Returns an int64 permutation of shape (n,). The last three of an odd batch rotate; a batch of
    one is its own partner. In a batch that was shuffled a neighbour is a random partner, and every
    slice that starts and ends at an even index holds whole pairs: the pairs don't depend on how
    many processes or accumulation steps share the batch.

    Raises ValueError for n < 1.

    >>> neighbour_pairs(6).tolist()
    [1, 0, 3, 2, 5, 4]
    >>> neighbour_pairs(5).tolist()
    [1, 0, 3, 4, 2]
    """
    if n < 1:
        raise ValueError(f"a batch has at least one sample, got {n}")
    partner = torch.arange(n) ^ 1
    if n % 2:
        partner[-3:] = torch.arange(n)[-3:].roll(-1)
    return partner


def mixup_batch(
    images: Tensor, targets: Tensor, lam: float, permutation: Tensor
) -> tuple[Tensor, Tensor]:
    """Blend each sample i with sample p(i): x = λ·xᵢ + (1 - λ)·xₚ₍ᵢ₎, and the targets likewise.

    `images` (N, C, H, W) and `targets` (N, K), one-hot or soft, are floating point; `permutation`
    (N,) is int64 with values in [0, N), on any device; λ is in [0, 1]. Returns new tensors of the
    same dtype and memory format. A sample that is its own partner comes back bit for bit.

    Raises ValueError for a λ out of range, integer images or targets, and shapes that don't fit.

    >>> images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 6)
    >>> mixed, soft = mixup_batch(images, torch.eye(2), 0.75, neighbour_pairs(2))
    >>> mixed[:, 0, 0, 0].tolist()
    [0.25, 0.75]
    >>> soft.tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """
    n = len(images)
    if not 0 <= lam <= 1:
        raise ValueError(f"mixup's λ must be in [0, 1], got {lam}")
    if not (images.is_floating_point() and targets.is_floating_point()):
        raise ValueError(f"mixup blends floats, got {images.dtype} images, {targets.dtype} targets")
    if targets.ndim != 2 or len(targets) != n or permutation.shape != (n,):
        raise ValueError(
            f"{n} images need targets ({n}, classes) and a permutation ({n},), "
            f"got {tuple(targets.shape)} and {tuple(permutation.shape)}"
        )
    partner = permutation.to(images.device, non_blocking=images.is_cuda)
    # lerp(a, b, λ) = a + λ·(b - a), in one pass, exact where a = b, in the partner's copy.
    return _select(images, partner).lerp_(images, lam), targets[partner].lerp_(targets, lam)


def _select(images: Tensor, index: Tensor) -> Tensor:
    """images[index], twice as fast: index_select copies images whole where they are contiguous."""
    if images.is_contiguous(memory_format=torch.channels_last):
        return images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return images.index_select(0, index)

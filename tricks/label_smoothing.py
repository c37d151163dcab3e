"""Label smoothing, and the cross-entropy that takes soft targets.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7,
https://arxiv.org/abs/1512.00567

Smooth the targets once, before or after mixing (both are linear, so the order doesn't matter), and
evaluate without it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["smooth_labels", "soft_cross_entropy"]


def smooth_labels(targets: Tensor, smoothing: float, shares: Tensor | None = None) -> Tensor:
    """Move a share ε of each target to all classes: (1 - ε)·t + ε/K, or (1 - ε)·t + ε·shares.

    `targets` (N, K) are floating point, one-hot or soft, each row summing to 1, and so does each
    row of the result. ε is in [0, 1]; 0.1 is usual. `shares` (K,), of the sum 1, distribute ε over
    the classes; None: the uniform distribution. With a loss that makes rare classes count for more
    (class weights, logit adjustment), give the classes' shares of train: a uniform ε/K would be
    more than a rare class's share, and the loss would enlarge it in every image.

    Raises ValueError for an ε out of range, targets that are class indices, and other shapes.

    >>> import torch
    >>> smooth_labels(torch.eye(4)[:1], 0.25)
    tensor([[0.8125, 0.0625, 0.0625, 0.0625]])
    >>> smooth_labels(torch.eye(2)[:1], 0.25, torch.tensor([0.75, 0.25]))
    tensor([[0.9375, 0.0625]])
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label smoothing must be in [0, 1], got {smoothing}")
    if targets.ndim != 2 or not targets.is_floating_point():
        raise ValueError(
            "label smoothing takes floating-point targets (N, classes), "
            f"got {targets.dtype} {tuple(targets.shape)}"
        )
    if shares is None:
        return targets * (1 - smoothing) + smoothing / targets.shape[1]
    if shares.shape != targets.shape[1:]:
        raise ValueError(f"shares must be ({targets.shape[1]},), got {tuple(shares.shape)}")
    return targets * (1 - smoothing) + smoothing * shares


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of soft targets: -1/N · Σᵢ Σₖ tᵢₖ · log softmax(zᵢ)ₖ, in nats, a scalar.

    `logits` and `targets` are (N, K). Computed, and returned, in the logits' precision, but in
    fp32 at least: in bf16 a difference of 1 % in the loss would already be rounded away.

    Raises ValueError where the two shapes differ.

    >>> import torch
    >>> soft_cross_entropy(torch.zeros(2, 4), torch.eye(4)[:2])  # log 4
    tensor(1.3863)
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(
            "logits and targets must both be (N, classes), "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets.to(logits.dtype))

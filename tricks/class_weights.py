"""Weights of the classes in the loss, so that rare classes count for more.

By inverse frequency, as scikit-learn's "balanced"; or by the effective number of images, which
counts each further image of a class for less: Cui et al., "Class-Balanced Loss Based on Effective
Number of Samples", CVPR 2019, https://arxiv.org/abs/1901.05555

Both are scaled so that the mean weight of a train image is 1: the loss, and with it the learning
rate, keep their size. (Cui et al. scale to a mean of 1 over the classes.)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["effective_number_weights", "inverse_frequency_weights", "weighted_cross_entropy"]


def inverse_frequency_weights(counts: Tensor) -> Tensor:
    """Σn / (K·n_k) for the classes' numbers of train images: (K,) -> float32 (K,).

    `counts` are whole numbers, at least 0; K counts the classes with images, the others
    have weight 0.

    Raises ValueError for other shapes, negative or fractional counts, and where all are 0.

    >>> import torch
    >>> inverse_frequency_weights(torch.tensor([75, 25]))
    tensor([0.6667, 2.0000])
    """
    _check_counts(counts)
    return _scaled(1 / counts.double(), counts)


def effective_number_weights(counts: Tensor, beta: float = 0.999) -> Tensor:
    """(1 - β) / (1 - β^n_k), scaled; counts and errors as for `inverse_frequency_weights`.

    β is in [0, 1): 0 weighs all classes alike, towards 1 it becomes the inverse frequency. The
    paper's are 0.9 to 0.9999.

    >>> import torch
    >>> effective_number_weights(torch.tensor([75, 25]), beta=0.9)
    tensor([0.9811, 1.0566])
    """
    _check_counts(counts)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    return _scaled((1 - beta) / (1 - beta ** counts.double()), counts)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """-1/N · Σᵢ Σₖ wₖ · tᵢₖ · log softmax(zᵢ)ₖ: a scalar, in the logits' precision, fp32 at least.

    `logits` and `targets` are (N, K), targets soft or one-hot; `weights` (K,). It is divided by N,
    and not by the weights of the batch as torch does for targets that are class indices. So the
    mean over the parts of a batch is that of the batch, on any number of processes.

    Raises ValueError where the shapes do not fit.

    >>> import torch
    >>> targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> weighted_cross_entropy(torch.zeros(2, 2), targets, torch.tensor([0.5, 1.5]))  # log 2
    tensor(0.6931)
    """
    if logits.ndim != 2 or logits.shape != targets.shape or weights.shape != logits.shape[1:]:
        raise ValueError(
            "logits and targets must both be (N, classes), weights (classes,), "
            f"got {tuple(logits.shape)}, {tuple(targets.shape)} and {tuple(weights.shape)}"
        )
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets.to(logits.dtype), weight=weights.to(logits.dtype))


def _scaled(weights, counts):
    weights = torch.where(counts > 0, weights, 0.0)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def _check_counts(counts):
    if counts.ndim != 1 or not len(counts) or counts.is_floating_point() or counts.is_complex():
        raise ValueError(
            f"counts must be whole numbers (classes,), got {counts.dtype} {tuple(counts.shape)}"
        )
    if counts.min() < 0 or counts.max() == 0:
        raise ValueError(f"counts must be at least 0 and not all 0, got {counts.tolist()[:10]}")

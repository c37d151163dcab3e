"""Logit adjustment for uneven classes: logits plus τ times the log of how frequent each class is.

Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, https://arxiv.org/abs/2007.07314

A network trained on uneven classes answers with the frequent ones when in doubt. Trained with
adjusted logits in the loss, it learns only what the frequencies do not explain, and its own logits,
without the adjustment, answer as if all classes were equally frequent. Subtracting after training
has the same aim: see `remove_priors`. Balanced accuracy rises; plain accuracy falls on test images
as uneven as the train images.
"""

import math

from torch import Tensor

__all__ = ["add_priors", "log_priors", "remove_priors"]


def log_priors(counts: Tensor) -> Tensor:
    """log(n_k / Σn) of the classes' numbers of train images: (K,) -> float32 (K,).

    `counts` are whole numbers, at least 0. A class without images counts as one with one image, so
    that its logarithm is finite.

    Raises ValueError for other shapes, negative or fractional counts, and where all are 0.

    >>> import torch
    >>> log_priors(torch.tensor([900, 100])).exp()
    tensor([0.9000, 0.1000])
    """
    _check_counts(counts)
    counts = counts.clamp(min=1).double()
    return (counts / counts.sum()).log().float()


def add_priors(logits: Tensor, priors: Tensor, tau: float = 1.0) -> Tensor:
    """Logits for the loss, z + τ·log π; evaluate with the logits z themselves.

    `logits` are (N, K), `priors` from `log_priors`, on the same device. τ = 1 is the Bayes-optimal
    choice for balanced accuracy; 0 changes nothing. Works with soft targets of any kind.

    Raises ValueError where the shapes differ, and for a τ that is negative or not finite.

    >>> import torch
    >>> add_priors(torch.zeros(1, 2), log_priors(torch.tensor([3, 1]))).softmax(dim=1)
    tensor([[0.7500, 0.2500]])
    """
    _check(logits, priors, tau)
    return logits + tau * priors


def remove_priors(logits: Tensor, priors: Tensor, tau: float = 1.0) -> Tensor:
    """Logits of a network trained without adjustment, as for equally frequent classes: z - τ·log π.

    Arguments and errors are those of `add_priors`. A τ chosen on held-out images often beats 1.

    >>> import torch
    >>> logits = torch.tensor([[0.75, 0.25]]).log()  # knows the frequencies, and nothing else
    >>> remove_priors(logits, log_priors(torch.tensor([3, 1]))).softmax(dim=1)
    tensor([[0.5000, 0.5000]])
    """
    _check(logits, priors, tau)
    return logits - tau * priors


def _check(logits, priors, tau):
    if logits.ndim != 2 or priors.shape != logits.shape[1:]:
        raise ValueError(
            "logits must be (N, classes) and priors (classes,), "
            f"got {tuple(logits.shape)} and {tuple(priors.shape)}"
        )
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau must be finite and at least 0, got {tau}")


def _check_counts(counts):
    if counts.ndim != 1 or not len(counts) or counts.is_floating_point() or counts.is_complex():
        raise ValueError(
            f"counts must be whole numbers (classes,), got {counts.dtype} {tuple(counts.shape)}"
        )
    if counts.min() < 0 or counts.max() == 0:
        raise ValueError(f"counts must be at least 0 and not all 0, got {counts.tolist()[:10]}")

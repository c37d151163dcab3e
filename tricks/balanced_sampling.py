"""The order of an epoch that shows rare classes more often, and frequent ones less.

Balanced and square-root sampling: Kang et al., "Decoupling Representation and Classifier for
Long-Tailed Recognition", ICLR 2020, https://arxiv.org/abs/1910.09217

torch's WeightedRandomSampler draws every image independently: a class's share of an epoch is left
to chance, some images come twice before others come once, and each process of a data-parallel run
draws for itself. Here the order is a pure function of the labels and a generator: it is the same on
any number of processes, and after resuming with a generator of the same seed. Every class comes as
often as its share says, give or take one, and no image comes again before all others of its class.
"""

import torch
from torch import Tensor

__all__ = ["class_shares", "weighted_order"]


def class_shares(counts: Tensor, power: float = 0.0) -> Tensor:
    """The share of an epoch that each class gets, ∝ n_k^power: (K,) -> float64 (K,), sum 1.

    `counts`: the classes' numbers of images, whole, at least 0; a class without images has no
    share. power 0 gives all others equal shares, 0.5 shares by the square root of the counts, 1
    shares by the counts.

    Raises ValueError for other shapes and counts, and for a power outside of [0, 1].

    >>> import torch
    >>> class_shares(torch.tensor([90, 10]), power=0.5)
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    _check_counts(counts)
    if not 0 <= power <= 1:
        raise ValueError(f"power must be in [0, 1], got {power}")
    shares = torch.where(counts > 0, counts.double() ** power, 0.0)
    return shares / shares.sum()


def weighted_order(labels: Tensor, shares: Tensor, generator: torch.Generator) -> Tensor:
    """The rows of an epoch, as many as there are, in an order drawn by `generator`: int64 (n,).

    `labels`: int64 (n,), in [0, K). `shares`: (K,), at least 0, of any sum: each class's part of
    the epoch is proportional to it. Class k comes floor or ceil of n·share times; each of its rows
    floor or ceil of that over its number of rows.

    `generator`: on the CPU, of the seed and the epoch; with the same one comes the same order.

    Raises ValueError for labels out of range, shares that are negative, not finite or all 0, and a
    class that has a share and no row.

    >>> import torch
    >>> labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    >>> order = weighted_order(labels, torch.tensor([1.0, 1.0]), torch.Generator().manual_seed(0))
    >>> labels[order].bincount(), order.bincount(minlength=8)[6:]
    (tensor([4, 4]), tensor([2, 2]))
    """
    counts = _check(labels, shares)
    # Systematic rounding: whole numbers within 1 of n·share, of the right sum, and equal to n·share
    # on average over many epochs
    ends = len(labels) * (shares.double() / shares.double().sum()).cumsum(0)
    last_class = shares.nonzero().max()
    ends = (ends + torch.rand((), generator=generator, dtype=torch.float64)).floor().long()
    ends[last_class:] = len(labels)
    totals = ends.diff(prepend=ends.new_zeros(1))

    shuffled = torch.randperm(len(labels), generator=generator)
    rows = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled within each
    of_class = labels[rows]
    starts = counts.cumsum(0) - counts
    ranks = torch.arange(len(rows)) - starts[of_class]
    passes, remainders = totals // counts.clamp(min=1), totals % counts.clamp(min=1)
    repeats = passes[of_class] + (ranks < remainders[of_class])
    order = rows.repeat_interleave(repeats)
    return order[torch.randperm(len(order), generator=generator)]


def _check(labels, shares):
    if labels.ndim != 1 or labels.dtype != torch.int64 or shares.ndim != 1 or not len(labels):
        raise ValueError(
            "labels must be int64 (n,) and shares (classes,), "
            f"got {labels.dtype} {tuple(labels.shape)} and {tuple(shares.shape)}"
        )
    if labels.min() < 0 or labels.max() >= len(shares):
        raise ValueError(
            f"labels must be in [0, {len(shares)}), got {labels.min()} to {labels.max()}"
        )
    if not shares.isfinite().all() or shares.min() < 0 or shares.max() == 0:
        raise ValueError("shares must be finite, at least 0 and not all 0")
    counts = labels.bincount(minlength=len(shares))
    empty_classes = ((counts == 0) & (shares > 0)).nonzero().flatten().tolist()
    if empty_classes:
        number = empty_classes[0]
        raise ValueError(f"class {number} has a share of {shares[number]:g} and no row")
    return counts


def _check_counts(counts):
    if counts.ndim != 1 or not len(counts) or counts.is_floating_point() or counts.is_complex():
        raise ValueError(
            f"counts must be whole numbers (classes,), got {counts.dtype} {tuple(counts.shape)}"
        )
    if counts.min() < 0 or counts.max() == 0:
        raise ValueError(f"counts must be at least 0 and not all 0, got {counts.tolist()[:10]}")

"""Is a difference in accuracy more than noise, and how alike are the errors?

`correct` says of each sample whether it was classified rightly: bool, or 0 and 1.

Percentile bootstrap: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979,
https://doi.org/10.1214/aos/1176344552
McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages", 1947, https://doi.org/10.1007/BF02295996; for classifiers: Dietterich, 1998,
https://doi.org/10.1162/089976698300017197
Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979,
https://www.jstor.org/stable/4615733
Errors and their correlation: Kuncheva and Whitaker, "Measures of Diversity in Classifier
Ensembles", 2003, https://doi.org/10.1023/A:1022859003006
"""

from collections.abc import Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "McNemar",
    "bootstrap_interval",
    "disagreement",
    "error_correlation",
    "holm",
    "mcnemar_exact",
    "oracle_accuracy",
    "paired_bootstrap_interval",
]


def bootstrap_interval(
    values: Tensor,
    confidence: float = 0.95,
    resamples: int = 10_000,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean: what it is if the samples are drawn again.

    values: (samples,), bool or float; `correct` gives the interval of the accuracy. Where all are
    -1, 0 or 1, the distribution of the mean is known (for 0 and 1 Binomial(n, p) / n), and its
    quantiles are exact and free of chance: the limit of ever more resamples. Only for other
    values, each sample's loss, say, are `resamples` drawn, with `generator`.

    The bootstrap knows no errors but those it has seen: with all samples right the interval is
    (1, 1). Raises ValueError for values that are not finite or none, for a `confidence` outside
    (0, 1) and less than 1 resample.

    >>> bootstrap_interval(torch.tensor([True] * 90 + [False] * 10))
    (0.84, 0.95)
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be of shape (samples,), got {tuple(values.shape)}")
    values = values.detach().double().cpu()
    if not values.isfinite().all():
        raise ValueError(
            f"{int((~values.isfinite()).sum())} of {len(values)} values are not finite"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be ≥ 1, got {resamples}")
    n = len(values)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    if ((values == 0) | (values.abs() == 1)).all():
        # The generating function (down/z + even + up·z)^n at the roots of unity, transformed back,
        # is the chance of each sum from -n to n. What rounds to less than 0 is 0.
        size = 1 << (2 * n).bit_length()  # of 2n + 1 or more: others can take 20 times as long
        shares = torch.zeros(size, dtype=torch.float64)
        shares[[-1, 0, 1]] = torch.stack([(values == v).double().mean() for v in (-1, 0, 1)])
        chances = torch.fft.irfft(torch.fft.rfft(shares) ** n, size).clamp(min=0)
        below = torch.cat((chances[-n:], chances[: n + 1])).cumsum(0)
        # Where both tails hold exactly as much as the quantile asks, rounding must not decide
        places = torch.searchsorted(below / below[-1], tails - 1e-12)
        low, high = ((places - n).double() / n).tolist()
        return low, high
    means = []
    most = max(1, min(1000, 10**7 // n))  # 80 MB of draws at a time
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        means.append(values[torch.randint(n, (rows, n), generator=generator)].mean(1))
    low, high = torch.cat(means).quantile(tails).tolist()
    return low, high


def paired_bootstrap_interval(
    a: Tensor,
    b: Tensor,
    confidence: float = 0.95,
    resamples: int = 10_000,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """The percentile bootstrap interval of mean(a) - mean(b), of the same samples.

    The samples are drawn in pairs, so what is hard for both cancels. Otherwise as
    `bootstrap_interval`: exact where a and b say what is right. Raises ValueError for different
    lengths too.

    >>> a = torch.tensor([True] * 90 + [False] * 10)
    >>> b = torch.tensor([True] * 84 + [False] * 16)
    >>> paired_bootstrap_interval(a, b)
    (0.02, 0.11)
    """
    if a.shape != b.shape:
        raise ValueError(f"pairs need equal shapes, got {tuple(a.shape)} and {tuple(b.shape)}")
    return bootstrap_interval(a.double() - b.double(), confidence, resamples, generator)


class McNemar(NamedTuple):
    """Samples that a alone and that b alone has right, and how likely so uneven a split is."""

    b: int
    c: int
    p: float


def mcnemar_exact(correct_a: Tensor, correct_b: Tensor) -> McNemar:
    """McNemar's exact test, two-sided: are a and b equally often right on the same samples?

    b samples are right with a only, c with b only; if both are as good, b is Binomial(b + c, ½).
    p is the chance of a split as uneven or more, the float next to the exact number; 1 where a and
    b are right on the same samples. Of several tests, correct the p values (`holm`).
    Raises ValueError for different lengths, and for values other than 0 and 1.

    >>> mcnemar_exact(torch.tensor([True] * 9 + [False]), torch.tensor([True] * 3 + [False] * 7))
    McNemar(b=6, c=0, p=0.03125)
    """
    a, b = _checked(correct_a, 1), _checked(correct_b, 1)
    if a.shape != b.shape:
        raise ValueError(f"pairs need equal shapes, got {tuple(a.shape)} and {tuple(b.shape)}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    with localcontext(Context(prec=50, Emin=MIN_EMIN, Emax=MAX_EMAX)):
        # 2^-n of a million is no float, and whole numbers of a million bits are slow. What is
        # rounded off in the 50th digit, a million times, does not reach a float's 16. Smaller
        # numbers are whole, and may lie halfway between two floats: these are divided as such.
        ways = total = Decimal(1)
        for k in range(min(only_a, only_b)):
            ways = ways * (n - k) / (k + 1)  # of k + 1 among n
            total += ways
        whole = total < 10**40
        p = 2 * int(total) / 2**n if whole else float(2 * total / Decimal(2) ** n)
    return McNemar(only_a, only_b, min(1.0, p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p values of several tests, so that chance in any one of them is counted.

        p̃₍ᵢ₎ = max over j ≤ i of min(1, (m - j + 1) · p₍ⱼ₎)

    of the m values sorted ascending; returned in the order given. Rejecting where p̃ ≤ α, the
    chance of rejecting even one true hypothesis is at most α, however the tests depend on each
    other, as those against one and the same member do. One value stays as it is.

    Raises ValueError for values outside [0, 1].

    >>> holm([0.25, 0.0625, 0.125])
    [0.25, 0.1875, 0.25]
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"p values must be in [0, 1], got {p}")
    corrected, least = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def disagreement(labels: Tensor) -> Tensor:
    """The share of samples on which two members predict different classes: (members, members).

    labels: predicted classes (members, samples). Float64, symmetric, 0 on the diagonal.

    >>> disagreement(torch.tensor([[0, 1, 2, 2], [0, 1, 2, 0]]))
    tensor([[0.0000, 0.2500],
            [0.2500, 0.0000]], dtype=torch.float64)
    """
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"labels must be (members, samples), got {tuple(labels.shape)}")
    return torch.stack([(labels != member).double().mean(1) for member in labels])


def error_correlation(correct: Tensor) -> Tensor:
    """Pearson's correlation of two members' errors, φ: float64 (members, members), -1 to 1.

    correct: (members, samples). 1 on the diagonal. A member that is always right, or never, has no
    correlation with another: 0, and not NaN. Raises ValueError for values other than 0 and 1.

    >>> error_correlation(torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]))
    tensor([[ 1.,  0., -1.],
            [ 0.,  1.,  0.],
            [-1.,  0.,  1.]], dtype=torch.float64)
    """
    values = _checked(correct, 2).double()
    spread = values - values.mean(1, keepdim=True)
    norms = spread.norm(dim=1, keepdim=True)
    constant = (values == values[:, :1]).all(1, keepdim=True)
    units = (spread / norms).masked_fill(constant, 0)
    return (units @ units.T).clamp(-1, 1).fill_diagonal_(1)


def oracle_accuracy(correct: Tensor) -> float:
    """The share of samples that at least one member has right; correct: (members, samples).

    What a choice of the best member for each sample would reach: no average or vote is bound by
    it, but few pass it. Raises ValueError for values other than 0 and 1.

    >>> oracle_accuracy(torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]))
    0.75
    """
    return _checked(correct, 2).any(0).double().mean().item()


def _checked(correct: Tensor, dims: int) -> Tensor:
    shape = ("samples",) if dims == 1 else ("members", "samples")
    if correct.ndim != dims or 0 in correct.shape:
        raise ValueError(f"correct must be ({', '.join(shape)}), got {tuple(correct.shape)}")
    odd = (correct != 0) & (correct != 1)
    if odd.any():
        raise ValueError(f"correct must be 0 and 1, got {correct[odd][0].item()}")
    return correct.bool()

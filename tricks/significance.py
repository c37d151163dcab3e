"""Is a difference in accuracy more than noise, and how alike are the errors?

`correct` tells for each sample whether it was classified correctly: bool, or 0 and 1.

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
    """The percentile bootstrap interval of a mean: its range if the samples were drawn again.

    values: (samples,), bool or float; `correct` gives the interval of the accuracy. If all are
    -1, 0 or 1, the distribution of the mean is known (for 0 and 1 Binomial(n, p) / n), and its
    quantiles are exact: the limit of infinitely many resamples. Only for other values, such as each
    sample's loss, `resamples` are drawn, with `generator`.

    The bootstrap only knows the errors in the samples: with all samples right the interval is
    (1, 1). Raises ValueError for no values or values that are not finite, for a `confidence`
    outside (0, 1) and for less than 1 resample.

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
        # is the chance of each sum from -n to n. A chance below 0 by rounding is set to 0.
        size = (
            1 << (2 * n).bit_length()
        )  # a power of 2 above 2n: other sizes can take 20 times as long
        shares = torch.zeros(size, dtype=torch.float64)
        shares[[-1, 0, 1]] = torch.stack([(values == v).double().mean() for v in (-1, 0, 1)])
        chances = torch.fft.irfft(torch.fft.rfft(shares) ** n, size).clamp(min=0)
        cumulative = torch.cat((chances[-n:], chances[: n + 1])).cumsum(0)
        # Where a tail holds exactly the quantile's share, rounding must not decide
        sums = torch.searchsorted(cumulative / cumulative[-1], tails - 1e-12)
        low, high = ((sums - n).double() / n).tolist()
        return low, high
    means = []
    chunk_size = max(1, min(1000, 10**7 // n))  # 80 MB of draws at a time
    for start in range(0, resamples, chunk_size):
        rows = min(chunk_size, resamples - start)
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

    The samples are drawn in pairs, so samples that are hard for both cancel. Otherwise as
    `bootstrap_interval`: exact where a and b are `correct`. Also raises ValueError for different
    lengths.

    >>> a = torch.tensor([True] * 90 + [False] * 10)
    >>> b = torch.tensor([True] * 84 + [False] * 16)
    >>> paired_bootstrap_interval(a, b)
    (0.02, 0.11)
    """
    if a.shape != b.shape:
        raise ValueError(f"pairs need equal shapes, got {tuple(a.shape)} and {tuple(b.shape)}")
    return bootstrap_interval(a.double() - b.double(), confidence, resamples, generator)


class McNemar(NamedTuple):
    """Samples that only a has right, those that only b has right, and the test's p value."""

    b: int
    c: int
    p: float


def mcnemar_exact(correct_a: Tensor, correct_b: Tensor) -> McNemar:
    """McNemar's exact test, two-sided: are a and b equally often right on the same samples?

    b samples are right with a only, c with b only; if both are as good, b is Binomial(b + c, ½).
    p is the chance of a split at least as uneven, as the float nearest to the exact number; 1 where
    a and b are right on the same samples. With several tests, correct the p values (`holm`).
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
        # For n of a million, 2^-n underflows, and integers of a million bits are slow. A million
        # roundings in the 50th digit do not reach the 16 digits of a float. Smaller totals are
        # exact, and may lie halfway between two floats: they are divided as integers.
        combinations = total = Decimal(1)
        for k in range(min(only_a, only_b)):
            combinations = combinations * (n - k) / (k + 1)  # k + 1 out of n
            total += combinations
        is_exact = total < 10**40
        p = 2 * int(total) / 2**n if is_exact else float(2 * total / Decimal(2) ** n)
    return McNemar(only_a, only_b, min(1.0, p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of the p values of several tests, for the chance that any one is small.

        p̃₍ᵢ₎ = max over j ≤ i of min(1, (m - j + 1) · p₍ⱼ₎)

    of the m values sorted ascending; returned in the original order. If hypotheses with p̃ ≤ α are
    rejected, the chance to reject any true one is at most α, however the tests depend on each
    other, as tests against the same member do. A single value stays as it is.

    Raises ValueError for values outside [0, 1].

    >>> holm([0.25, 0.0625, 0.125])
    [0.25, 0.1875, 0.25]
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"p values must be in [0, 1], got {p}")
    results, least = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        results[index] = least
    return results


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
    deviations = values - values.mean(1, keepdim=True)
    norms = deviations.norm(dim=1, keepdim=True)
    constant = (values == values[:, :1]).all(1, keepdim=True)
    units = (deviations / norms).masked_fill(constant, 0)
    return (units @ units.T).clamp(-1, 1).fill_diagonal_(1)


def oracle_accuracy(correct: Tensor) -> float:
    """The share of samples that at least one member has right; correct: (members, samples).

    It is the accuracy of choosing the best member for each sample: not a bound for averages or
    votes, but few exceed it. Raises ValueError for values other than 0 and 1.

    >>> oracle_accuracy(torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]))
    0.75
    """
    return _checked(correct, 2).any(0).double().mean().item()


def _checked(correct: Tensor, dims: int) -> Tensor:
    shape = ("samples",) if dims == 1 else ("members", "samples")
    if correct.ndim != dims or 0 in correct.shape:
        raise ValueError(f"correct must be ({', '.join(shape)}), got {tuple(correct.shape)}")
    invalid = (correct != 0) & (correct != 1)
    if invalid.any():
        raise ValueError(f"correct must be 0 and 1, got {correct[invalid][0].item()}")
    return correct.bool()

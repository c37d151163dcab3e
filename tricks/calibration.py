"""The quality of predicted probabilities: scores, reliability, and temperature.

Predictions are probabilities (samples, classes), labels int64 (samples,).

Temperature scaling and the expected calibration error: Guo et al., "On Calibration of Modern
Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599
The Brier score: Brier, "Verification of forecasts expressed in terms of probability", 1950,
https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Reliability",
    "accuracy",
    "brier",
    "expected_calibration_error",
    "fit_temperature",
    "nll",
    "reliability_table",
]

COLDEST, HOTTEST = 0.01, 100.0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 that minimises the NLL of softmax(logits / T) on these samples.

    logits: finite (samples, classes); for an ensemble the logarithms of its probabilities. The NLL
    is convex in 1 / T: Newton's method, kept inside a bracket, in float64. T is at least 0.01, the
    result where all predictions are right and the best T would be 0, and at most 100, the result
    where they are worse than chance and it would be infinite. If T has no effect, it is 1.

    Fit on images that the network was not trained on. Raises ValueError for logits that are not
    finite and for labels that don't fit.

    >>> logits, labels = torch.tensor([[3.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    >>> (logits[0] / fit_temperature(logits, labels)).softmax(0)  # 3 of 4 are right
    tensor([0.7500, 0.2500])
    """
    _check_shapes(logits, labels)
    if not logits.isfinite().all():
        raise ValueError(f"{int((~logits.isfinite()).any(1).sum())} samples' logits are not finite")
    logits = logits.double()
    gaps = logits - logits.gather(1, labels.unsqueeze(1))  # NLL = mean log Σ exp(gaps / T)

    def slopes(inverse: float) -> tuple[float, float]:
        """The NLL's first and second derivatives by 1 / T."""
        probabilities = (inverse * gaps).softmax(1)
        mean = (probabilities * gaps).sum(1, keepdim=True)
        variance = (probabilities * (gaps - mean).square()).sum(1)
        return mean.mean().item(), variance.mean().item()

    if not gaps.any():
        return 1.0
    low, high = 1 / HOTTEST, 1 / COLDEST
    if slopes(high)[0] <= 0:  # exactly 0 where float64 rounds all doubt away
        return COLDEST
    if slopes(low)[0] >= 0:
        return HOTTEST
    inverse = 1.0
    slope, curvature = slopes(inverse)
    for _ in range(200):
        if slope == 0:
            break
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = slope / curvature if curvature > 0 else math.inf
        previous, inverse = inverse, inverse - step
        # Tested before the bracket: the solution may be an end of it by now, which the last step
        # can pass by rounding, and halving the bracket would then start the search again.
        if abs(inverse - previous) <= 1e-12 * previous:
            break
        if not low < inverse < high:
            inverse = math.sqrt(low * high)
        slope, curvature = slopes(inverse)
    return 1 / inverse


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """The share of samples whose likeliest class is the label; of equal ones the first counts.

    Errors as in `nll`, as for the scores below.

    >>> accuracy(torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([0, 0]))
    0.5
    """
    _check_probabilities(probabilities, labels)
    return (probabilities.argmax(1) == labels).double().mean().item()


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """The mean of -log of the label's probability, in nats; infinite where one of them is 0.

    Raises ValueError unless the rows are probabilities (not logits) and the labels fit.

    >>> round(nll(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0])), 4)  # ln 8 / 2
    1.0397
    """
    _check_probabilities(probabilities, labels)
    likelihoods = probabilities.gather(1, labels.unsqueeze(1))
    return -likelihoods.double().log().mean().item()


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """The squared distance from the one-hot label, Σ over classes, mean over samples: 0 to 2.

    For two classes, some define it as half of this.

    >>> round(brier(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([0])), 4)  # .09 + .04 + .01
    0.14
    """
    _check_probabilities(probabilities, labels)
    errors = probabilities.to(torch.float64, copy=True)
    errors.scatter_add_(1, labels.unsqueeze(1), -torch.ones_like(errors[:, :1]))
    return errors.square().sum(1).mean().item()


class Reliability(NamedTuple):
    """A reliability diagram's bars, one a bin: number of samples, confidence, accuracy."""

    counts: Tensor  # int64 (bins,)
    confidence: Tensor  # float64 (bins,), the mean probability of the likeliest class
    accuracy: Tensor  # float64 (bins,)


def reliability_table(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Samples by the probability of their likeliest class: counts, mean confidence, accuracy.

    `bins` of equal width from 0 to 1; each holds its upper edge and not its lower one. An empty
    one has zeros. Raises ValueError for less than 1 bin.

    >>> probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    >>> table = reliability_table(probabilities, torch.tensor([0, 0, 0]), bins=4)
    >>> table.counts.tolist(), table.accuracy.tolist()
    ([0, 0, 1, 2], [0.0, 0.0, 1.0, 0.5])
    """
    if bins < 1:
        raise ValueError(f"bins must be ≥ 1, got {bins}")
    _check_probabilities(probabilities, labels)
    confidence, predicted = probabilities.max(1)
    confidence = confidence.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    # Edges are rounded as the probabilities are: 0.6 in float32 is above 0.6, yet it is on the edge
    bin_index = torch.bucketize(confidence, edges[1:-1].to(probabilities.dtype).double())
    counts = bin_index.bincount(minlength=bins)
    divisors = counts.clamp(min=1)
    right = (predicted == labels).double()
    sums = [bin_index.bincount(values, minlength=bins) for values in (confidence, right)]
    return Reliability(counts, sums[0] / divisors, sums[1] / divisors)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The mean over samples of their bin's |accuracy - confidence|, by `reliability_table`.

    With few samples in a bin the two differ by chance: even a perfectly calibrated network has an
    error above 0, which grows with the number of bins.

    >>> probabilities = torch.tensor([[0.75, 0.25]] * 4)
    >>> expected_calibration_error(probabilities, torch.tensor([0, 0, 0, 1]))
    0.0
    >>> expected_calibration_error(probabilities, torch.tensor([0, 1, 1, 1]))
    0.5
    """
    table = reliability_table(probabilities, labels, bins)
    gaps = (table.accuracy - table.confidence).abs()
    return ((table.counts * gaps).sum() / table.counts.sum()).item()


def _check_shapes(values: Tensor, labels: Tensor) -> None:
    if values.ndim != 2 or 0 in values.shape or not values.is_floating_point():
        raise ValueError(
            f"predictions must be floats of shape (samples, classes), got {values.dtype} of "
            f"{tuple(values.shape)}"
        )
    samples, classes = values.shape
    if labels.shape != (samples,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({samples},), got {labels.dtype} of "
            f"{tuple(labels.shape)}"
        )
    low, high = (bound.item() for bound in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {low} to {high}")


def _check_probabilities(probabilities: Tensor, labels: Tensor) -> None:
    _check_shapes(probabilities, labels)
    # 2e-2: the rounding of bfloat16
    precision = torch.promote_types(probabilities.dtype, torch.float32)
    sums = probabilities.sum(1, dtype=precision)
    low, high = (bound.item() for bound in sums.aminmax())
    if probabilities.amin() >= 0 and low >= 1 - 2e-2 and high <= 1 + 2e-2:  # none for NaN
        return
    invalid = ~((probabilities >= 0).all(1) & (sums >= 1 - 2e-2) & (sums <= 1 + 2e-2))
    row = int(invalid.nonzero()[0])
    raise ValueError(
        f"row {row} is no distribution: from {probabilities[row].min().item():.4g}, "
        f"with the sum {sums[row].item():.4g}"
    )

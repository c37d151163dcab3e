"""Conformal prediction: sets of classes that contain the right one with a chosen probability.

Split conformal: the scores of n calibration images, which the network was not trained on, give a
threshold; the set of a new image is the classes whose score is no higher. If all images are drawn
in the same way (exchangeable), the set holds the class with a chance of at least 1 - α, whatever
the network, on average over images and calibration sets. For one calibration set the coverage is a
draw of Beta(k, n + 1 - k), k = ⌈(n + 1)(1 - α)⌉, where no two scores are equal, and higher where
some are.

Threshold sets (LAC): Sadinle et al., "Least Ambiguous Set-Valued Classifiers with Bounded Error
Levels", 2019, https://arxiv.org/abs/1609.00451
Adaptive sets (APS): Romano et al., "Classification with Valid and Adaptive Coverage", NeurIPS 2020,
https://arxiv.org/abs/2006.02544

Probabilities are floats (n, classes), each row summing to 1. Scores have the same shape, in fp32 at
least: high where a class does not fit. Use the same kind for calibration and prediction.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["aps_scores", "calibrate_threshold", "lac_scores", "predict_sets"]


def lac_scores(probabilities: Tensor) -> Tensor:
    """The score of every class for threshold sets: 1 - pₖ, (n, classes).

    With the true probabilities no other sets of the same coverage are smaller on average. Easy
    images are covered more often than hard ones, and a set is empty where no class is likely
    enough. Raises ValueError for rows that are not probabilities.

    >>> import torch
    >>> lac_scores(torch.tensor([[0.75, 0.25]]))
    tensor([[0.2500, 0.7500]])
    """
    _check_probabilities(probabilities)
    return 1 - _wide(probabilities)


def aps_scores(probabilities: Tensor, uniforms: Tensor | None = None) -> Tensor:
    """The score of every class for adaptive sets: Σ of the pⱼ of likelier classes + u·pₖ.

    Sets grow on hard images, so that these are covered about as often as easy ones. Of equally
    likely classes the first goes before the others.

    uniforms: floats (n,) in [0, 1], one independent u for each image, in calibration and
    prediction, for the paper's randomised sets: they are smaller, and can be empty. None: u = 0,
    for deterministic sets: the likeliest classes until their mass exceeds the threshold. These are
    never empty, and cover more than 1 - α where the likeliest class alone is right more often.

    Returns (n, classes). Raises ValueError for rows that are not probabilities, and for uniforms of
    another type or shape or out of range.

    >>> import torch
    >>> probabilities = torch.tensor([[0.25, 0.625, 0.125]])
    >>> aps_scores(probabilities)
    tensor([[0.6250, 0.0000, 0.8750]])
    >>> aps_scores(probabilities, torch.tensor([0.5]))
    tensor([[0.7500, 0.3125, 0.9375]])
    """
    _check_probabilities(probabilities)
    sorted_values, classes = _wide(probabilities).sort(dim=1, descending=True, stable=True)
    likelier = sorted_values.cumsum(1).roll(1, 1)
    likelier[:, 0] = 0
    if uniforms is not None:
        if uniforms.shape != probabilities.shape[:1] or not uniforms.is_floating_point():
            raise ValueError(
                f"uniforms must be floats of shape ({len(probabilities)},), got {uniforms.dtype} "
                f"of {tuple(uniforms.shape)}"
            )
        if not ((uniforms >= 0) & (uniforms <= 1)).all():
            raise ValueError("uniforms must be in [0, 1]")
        likelier = likelier + uniforms.to(sorted_values.dtype).unsqueeze(1) * sorted_values
    return torch.empty_like(likelier).scatter_(1, classes, likelier)


def calibrate_threshold(scores: Tensor, labels: Tensor, alpha: float) -> float:
    """The k-th smallest of the labels' scores, k = ⌈(n + 1)(1 - α)⌉: their finite-sample quantile.

    scores: (n, classes) of the calibration images; labels: int64 (n,). α in (0, 1) is the share of
    sets that may miss the class. Infinite where k > n, that is n < 1/α - 1: too few images for this
    α, and every set will hold all classes.

    Raises ValueError for an α out of range, scores that are not floats (n, classes), are empty or
    NaN, and labels that don't fit.

    >>> import torch
    >>> scores, labels = torch.arange(10.0).view(5, 2), torch.zeros(5, dtype=torch.int64)
    >>> calibrate_threshold(scores, labels, alpha=0.4)  # the 4th of 0, 2, 4, 6, 8
    6.0
    >>> calibrate_threshold(scores, labels, alpha=0.1)
    inf
    """
    if not 0 < alpha < 1:
        raise ValueError(f"α must be in (0, 1), got {alpha}")
    _check_scores(scores)
    n, classes = scores.shape
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({n},), got {labels.dtype} of {tuple(labels.shape)}"
        )
    low, high = (bound.item() for bound in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {low} to {high}")
    # The decimal α exactly: in floats, 20 · (1 - 0.45) is a little above 11, and becomes 12
    k = math.ceil((n + 1) * (1 - Fraction(str(float(alpha)))))
    if k > n:
        return math.inf
    return scores.gather(1, labels.unsqueeze(1)).flatten().kthvalue(k).values.item()


def predict_sets(scores: Tensor, threshold: float) -> Tensor:
    """The classes whose score is at most the threshold: bool (n, classes), a set each row.

    scores: (n, classes) of new images, threshold: of `calibrate_threshold`. Raises ValueError for
    scores that are not floats (n, classes), are empty or NaN, and for a threshold that is NaN.

    >>> import torch
    >>> predict_sets(lac_scores(torch.tensor([[0.75, 0.25], [0.5, 0.5]])), threshold=0.5)
    tensor([[ True, False],
            [ True,  True]])
    """
    _check_scores(scores)
    if math.isnan(threshold):
        raise ValueError("the threshold must not be NaN")
    return scores <= threshold


def _wide(probabilities: Tensor) -> Tensor:
    return probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))


def _check_scores(scores: Tensor, name: str = "scores") -> None:
    if scores.ndim != 2 or 0 in scores.shape or not scores.is_floating_point():
        raise ValueError(
            f"{name} must be floats of shape (n, classes), got {scores.dtype} of "
            f"{tuple(scores.shape)}"
        )
    if scores.isnan().any():
        raise ValueError(f"{name} of {int(scores.isnan().any(1).sum())} images are NaN")


def _check_probabilities(probabilities: Tensor) -> None:
    _check_scores(probabilities, "probabilities")
    sums = probabilities.sum(1, dtype=torch.promote_types(probabilities.dtype, torch.float32))
    # 2e-2: the rounding of bfloat16
    invalid = (probabilities < 0).any(1) | ((sums - 1).abs() > 2e-2)
    if invalid.any():
        row = int(invalid.nonzero()[0])
        raise ValueError(
            f"row {row} is no distribution: from {probabilities[row].min().item():.4g}, with the "
            f"sum {sums[row].item():.4g}"
        )

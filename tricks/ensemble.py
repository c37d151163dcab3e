"""Combine the predictions of several networks into one.

Logits are (members, samples, classes), float of any precision; results are computed in
float64. For probabilities, give their logarithms as logits.

Averages and votes: Hansen and Salamon, "Neural Network Ensembles", 1990,
https://doi.org/10.1109/34.58871
Greedy selection: Caruana et al., "Ensemble Selection from Libraries of Models", ICML 2004,
https://doi.org/10.1145/1015330.1015432
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "average_logits",
    "average_probabilities",
    "crossfit",
    "fit_weights",
    "greedy_selection",
    "majority_vote",
]


def average_probabilities(
    logits: Tensor, weights: Tensor | Sequence[float] | None = None
) -> Tensor:
    """The members' mean probabilities, Σ wₘ · softmax(logitsₘ): float64 (samples, classes).

    weights: one a member, ≥ 0, with the sum 1; None for equal ones. A member of weight 0 is
    ignored. Raises ValueError, with the member's number, for logits that are not finite, and for
    weights that are not on the simplex.

    >>> logits = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]]).log()
    >>> average_probabilities(logits)
    tensor([[0.6000, 0.4000]], dtype=torch.float64)
    >>> average_probabilities(logits, [0.25, 0.75])
    tensor([[0.4500, 0.5500]], dtype=torch.float64)
    """
    _check_logits(logits)
    shares = _check_weights(logits, weights)
    # One member at a time: 50,000 samples of 1,000 classes are 0.4 GB in float64.
    return sum(w * m.double().softmax(1) for w, m in zip(shares, logits, strict=True) if w)


def average_logits(logits: Tensor, weights: Tensor | Sequence[float] | None = None) -> Tensor:
    """The members' mean logits, Σ wₘ · logitsₘ: float64 (samples, classes).

    Its softmax is the normalised geometric mean of the members' probabilities: a member that
    rules a class out has a veto, while `average_probabilities` lets others outvote it. Weights
    and errors as there.

    >>> logits = torch.tensor([[[4.0, 0.0]], [[0.0, 2.0]]])
    >>> average_logits(logits)
    tensor([[2., 1.]], dtype=torch.float64)
    """
    _check_logits(logits)
    shares = _check_weights(logits, weights)
    return sum(w * m.double() for w, m in zip(shares, logits, strict=True) if w)


def majority_vote(logits: Tensor) -> tuple[Tensor, Tensor, int]:
    """Each member votes for its likeliest class: labels, shares of the votes, number of ties.

    labels: int64 (samples,), the class with the most votes; among several with equally many, the
    one with the largest summed probability. shares: float64 (samples, classes), votes / members.
    The last value counts the samples with such a tie. Raises ValueError, with the member's number,
    for logits that are not finite.

    >>> logits = torch.tensor([[[0.9, 0.1], [0.8, 0.2]], [[0.3, 0.7], [0.6, 0.4]]]).log()
    >>> labels, shares, ties = majority_vote(logits)
    >>> labels.tolist(), shares.tolist(), ties
    ([0, 0], [[0.5, 0.5], [1.0, 0.0]], 1)
    """
    _check_logits(logits)
    votes = torch.zeros(logits.shape[1:], dtype=torch.float64, device=logits.device)
    for member in logits:
        winner = member.argmax(1, keepdim=True)
        votes.scatter_add_(1, winner, torch.ones_like(winner, dtype=votes.dtype))
    is_winner = votes == votes.amax(1, keepdim=True)
    labels = average_probabilities(logits).masked_fill(~is_winner, -1).argmax(1)
    return labels, votes / len(logits), int((is_winner.sum(1) > 1).sum())


def fit_weights(
    logits: Tensor, labels: Tensor, tolerance: float = 1e-6, max_rounds: int = 10_000
) -> Tensor:
    """Weights that minimise the NLL of `average_probabilities` on some samples: float64 (members,).

    labels: int64 (samples,). Expectation maximisation from equal weights: each becomes the member's
    mean share of the label's averaged probability. The problem is convex, every round lowers the
    NLL, and there is no step size. Since NLL(w) - min NLL ≤ max gradient ratio - 1, it stops as
    soon as the NLL is known to be within `tolerance` nats of the best, or after `max_rounds`. Equal
    members keep equal weights; that of a useless one goes towards 0.

    Fit on images that no member was trained on. Raises ValueError for logits that are not finite
    (with the member's number) and for labels that don't fit.

    >>> right, wrong = [[0.8, 0.2]], [[0.4, 0.6]]
    >>> fit_weights(torch.tensor([right, wrong]).log(), torch.tensor([0])).round(decimals=4)
    tensor([1., 0.], dtype=torch.float64)
    """
    _check_logits(logits)
    _check_labels(logits, labels)
    likelihoods = torch.stack([_label_log_probabilities(member, labels) for member in logits])
    # A factor common to all members of a sample changes no ratio, and keeps exp from underflow.
    likelihoods = (likelihoods - likelihoods.amax(0)).exp_()
    weights = torch.full(
        (len(logits),), 1 / len(logits), dtype=likelihoods.dtype, device=likelihoods.device
    )
    for _ in range(max_rounds):
        ratios = (likelihoods / (weights @ likelihoods)).mean(
            1
        )  # of the gradient: 1 where a weight is optimal
        if ratios.max() <= 1 + tolerance:
            break
        weights = weights * ratios
        weights /= weights.sum()
    return weights


def greedy_selection(logits: Tensor, labels: Tensor, max_rounds: int = 50) -> list[int]:
    """Caruana's forward selection with replacement: the members to average, repeats and all.

    labels: int64 (samples,). Starts with the best single member and adds, at most `max_rounds`
    times, the one that makes the averaged probabilities best, as long as they become better.
    Better means more samples right, then a lower NLL: accuracy is the goal, but alone it would stop
    at its first plateau, and NLL alone is what `fit_weights` minimises. Among equals the first is
    chosen. Members are listed in the order of choice; the number of times is a member's weight.

    Select on images that no member was trained on. Raises ValueError for logits that are not
    finite (with the member's number) and for labels that don't fit.

    >>> a, b, c = [[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]], [[0.1, 0.9], [0.9, 0.1]]
    >>> greedy_selection(torch.tensor([a, b, c]).log(), torch.tensor([0, 1]))
    [0, 1]
    """
    _check_logits(logits)
    _check_labels(logits, labels)
    if max_rounds < 0:
        raise ValueError(f"max_rounds must be ≥ 0, got {max_rounds}")
    probabilities = [member.double().softmax(1) for member in logits]

    def score_of(total: Tensor, number: int) -> tuple[int, float]:
        right = int((total.argmax(1) == labels).sum())
        likelihoods = total.gather(1, labels.unsqueeze(1)) / number
        return right, likelihoods.log().mean().item()

    selection: list[int] = []
    best = (-1, 0.0)
    total = torch.zeros_like(probabilities[0])
    for _ in range(1 + max_rounds):
        scores = [score_of(total + candidate, len(selection) + 1) for candidate in probabilities]
        index = max(range(len(scores)), key=scores.__getitem__)  # the first of equals
        right, likelihood = scores[index]
        # A gain of less than 1e-9 nats may be due to rounding, and differ on another machine.
        if right < best[0] or (right == best[0] and not likelihood > best[1] + 1e-9):
            break
        best = scores[index]
        selection.append(index)
        total += probabilities[index]
    return selection


def crossfit(
    labels: Tensor,
    fit: Callable[[Tensor], Any],
    predict: Callable[[Any, Tensor], Tensor],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Predictions for all samples, those of each half from a fit on the other half.

    `fit` gets the numbers of the samples to fit on, int64 and rising, and returns any value;
    `predict` gets that value and the numbers to predict, and returns a tensor with a row for each.
    The rows come back in the order of the samples. The halves are drawn with `generator`,
    stratified by `labels`, int64 (samples,): their sizes, and those of every class, differ by 1 at
    most.

    Raises ValueError for fewer than 2 samples.

    >>> values = torch.tensor([1.0, 1.0, 3.0, 3.0])
    >>> crossfit(
    ...     labels=torch.tensor([0, 0, 1, 1]),
    ...     fit=lambda rows: values[rows].mean(),
    ...     predict=lambda mean, rows: values[rows] - mean,
    ... )
    tensor([-1., -1.,  1.,  1.])
    """
    if labels.ndim != 1 or len(labels) < 2:
        raise ValueError(f"labels must be of 2 samples or more, got shape {tuple(labels.shape)}")
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]  # each class in one run, shuffled
    halves = [order[start::2].sort().values for start in (0, 1)]
    predictions = [
        predict(fit(other_half), half)
        for half, other_half in zip(halves, reversed(halves), strict=True)
    ]
    position = torch.cat(halves).argsort()
    predicted = torch.cat(predictions)
    return predicted[position.to(predicted.device)]


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 3 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(
            "logits must be floats of shape (members, samples, classes), got "
            f"{logits.dtype} of {tuple(logits.shape)}"
        )
    for index, member in enumerate(logits):
        if not member.isfinite().all():
            count = int((~member.isfinite()).any(1).sum())
            raise ValueError(
                f"the logits of member {index} are not finite for {count} of {len(member)} samples"
            )


def _check_weights(logits: Tensor, weights: Tensor | Sequence[float] | None) -> list[float]:
    members = len(logits)
    if weights is None:
        return [1 / members] * members
    shares = torch.as_tensor(weights, dtype=torch.float64)
    if shares.shape != (members,):
        raise ValueError(f"{members} members need as many weights, got {shares.tolist()}")
    # The sum may be off by float32's rounding of thirds, which the division corrects
    if not (shares >= 0).all() or not abs(shares.sum().item() - 1) <= 1e-5:
        raise ValueError(f"weights must be ≥ 0 with the sum 1, got {shares.tolist()}")
    return (shares / shares.sum()).tolist()


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    _, samples, classes = logits.shape
    if labels.shape != (samples,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({samples},), got {labels.dtype} of "
            f"{tuple(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must be 0 to {classes - 1}, got {labels.min().item()} to {labels.max().item()}"
        )


def _label_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.double().log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)

"""What each member, and each combination of them, predicts for the scored images.

Weights, selections and temperatures are fitted on images that no member was trained on: those of
role "fitted" or, where there are none or too few, half of those of role "scored"; the other half is
then scored with the result, and vice versa.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from harness.counters import generator
from tricks.calibration import fit_temperature
from tricks.ensemble import (
    average_logits,
    crossfit,
    fit_weights,
    greedy_selection,
    majority_vote,
)
from tricks.soup import greedy_ingredients
from tricks.tta import average_views

LEAST = 1e-3  # smallest fitted weight
LEAST_FITTED = 100  # images; with fewer, half of the scored ones are used, if those are more


class Result(NamedTuple):
    """The predictions of a member or a combination for the scored images."""

    name: str
    kind: str  # "member", "combination" or "control"
    labels: Tensor  # int64 (n,), the predicted classes
    probabilities: Tensor  # float64 (n, classes); of a vote, the shares of the votes
    calibrated: Tensor | None  # after the temperature; None for votes
    temperatures: list[float]  # one, or one a half
    details: dict  # what JSON can hold
    passes: int  # networks that an image goes through, for each view


def member_results(names, logits, labels, seed) -> list[Result]:
    """The Result of each member.

    logits: {role: (members, n, classes)} of "scored" and perhaps "fitted"; labels: {role: (n,)}.
    """
    results = []
    for number, name in enumerate(names):

        def predict(_, role, rows, number=number):
            return logits[role][number, rows]

        results.append(_result(name, "member", labels, _no_fit, predict, seed))
    return results


def combined_results(
    names, logits, labels, seed, *, average="probabilities", weights=None
) -> list[Result]:
    """The combinations of the members' predictions: average, vote, weighted, greedy.

    logits, labels: as for `member_results`. average: of "probabilities" or "logits". weights: one
    a member, None to fit them.
    """
    members = len(names)

    def mean(_, role, rows):
        mean_of = average_logits if average == "logits" else average_views
        return mean_of(logits[role][:, rows])

    def fitted_weights(role, rows):
        shares = fit_weights(logits[role][:, rows], labels[role][rows])
        shares[shares < LEAST] = 0  # a tiny weight becomes 0: that network need not run
        return (shares / shares.sum()).tolist()

    def greedy_shares(role, rows):
        selection = greedy_selection(logits[role][:, rows], labels[role][rows])
        return [selection.count(number) / len(selection) for number in range(members)]

    def constant_weights(role, rows):
        return list(weights)

    def weighted_mean(shares, role, rows):
        return average_views(logits[role][:, rows], shares)

    def result(name, fit, predict):
        return _result(name, "combination", labels, fit, predict, seed, names)

    classes, shares, ties = majority_vote(logits["scored"])
    shares.scatter_add_(1, classes.unsqueeze(1), torch.full_like(shares[:, :1], 1e-9))  # for ties
    details = {"ties": ties}
    return [
        result("average", _no_fit, mean)._replace(details={"of": average}, passes=members),
        Result("vote", "combination", classes, shares, None, [], details, members),
        result("weighted", fitted_weights if weights is None else constant_weights, weighted_mean),
        result("greedy", greedy_shares, weighted_mean),
    ]


def soup_results(groups, soup, members, labels, seed) -> list[Result]:
    """A uniform and a greedy soup of each group of members that share an architecture.

    groups: lists of members' numbers. soup: a function (numbers, role, all_views) -> logits
    (n, classes) of the soup of these members for a role's images, averaged over all views or, with
    all_views=False, of one view. The processes share the work of making a soup, so all call this.
    members: the members' own Results.

    The third Result of each group is the "control": its best member, made as a soup of one. Its
    gain over that member comes from BatchNorm's statistics, not from averaging weights. A greedy
    soup that chose a single member combines nothing, and is a control, too.
    """
    results, names, truth = [], [member.name for member in members], labels["scored"]
    for group in groups:

        def uniform(role, rows, group=group):
            return group

        def greedy(role, rows, group=group):
            def accuracy(indices):
                logits = soup(sorted(group[index] for index in indices), role, False)
                return (logits[rows].argmax(1) == labels[role][rows]).double().mean().item()

            return sorted(group[index] for index in greedy_ingredients(len(group), accuracy))

        def predict(numbers, role, rows):
            return soup(numbers, role, True)[rows]

        members_text = (
            f" of {', '.join(names[number] for number in group)}" if len(groups) > 1 else ""
        )
        for method, fit in (("uniform", uniform), ("greedy", greedy)):
            name = f"{method} soup{members_text}"
            result = _result(name, "combination", labels, fit, predict, seed)
            is_single = all(len(set(numbers)) == 1 for numbers in result.details["soup"])
            results.append(result._replace(kind="control") if is_single else result)
        best = max(group, key=lambda number: (members[number].labels == truth).sum().item())

        def best_member(role, rows, best=best):
            return [best]

        name = f"{names[best]}, as a soup of one"
        results.append(_result(name, "control", labels, best_member, predict, seed))
    return results


def _no_fit(role, rows):
    return None


def _result(name, kind, labels, fit, predict, seed, names=None):
    """The Result of fitting by `fit` and predicting by `predict`, see `_fit_and_predict`.

    `fit` gives the weights of `names` or, without names, the numbers of a soup's members.
    """
    logits, calibrated, pairs = _fit_and_predict(labels, fit, predict, seed)
    fits = [fit_result for fit_result, _ in pairs]
    details, passes = {}, 1
    if names and fits[0] is not None:
        details = {"weights": [dict(zip(names, shares, strict=True)) for shares in fits]}
        passes = max(sum(share > 0 for share in shares) for shares in fits)
    elif fits[0] is not None:
        details = {"soup": fits}  # a list of members' numbers for each fit
    return Result(
        name, kind, logits.argmax(1), logits.softmax(1), calibrated.softmax(1),
        [temperature for _, temperature in pairs], details, passes,
    )  # fmt: skip


def _fit_and_predict(labels, fit, predict, seed):
    """Logits of the scored images before and after the temperature, and [(fit, temperature)].

    fit: a function (role, rows) -> any value. predict: a function (that value, role, rows) ->
    logits (rows, classes). There are two fits where each half is scored with that of the other.
    """

    def fit_on(role, rows):
        fit_result = fit(role, rows)
        return fit_result, fit_temperature(predict(fit_result, role, rows), labels[role][rows])

    def outputs_of(pair, rows):
        fit_result, temperature = pair
        logits = predict(fit_result, "scored", rows)
        return torch.stack([logits, logits / temperature], dim=1)

    fits = []

    def fit_half(rows):
        fits.append(fit_on("scored", rows))
        return fits[-1]

    if "fitted" in labels:
        fits.append(fit_on("fitted", torch.arange(len(labels["fitted"]))))
        outputs = outputs_of(fits[0], torch.arange(len(labels["scored"])))
    else:
        rng = generator(seed, "halves")
        outputs = crossfit(labels["scored"], fit_half, outputs_of, rng)
    return outputs[:, 0], outputs[:, 1], fits

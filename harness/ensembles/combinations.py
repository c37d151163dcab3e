"""What each member, and each way to combine them, predicts for the scored images.

Whatever is fitted (weights, selections, temperatures) is fitted on images that no member was
trained on: on role "fitted", or, where there is none (or too little), on the half of role "scored"
that is not scored with it.
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
LEAST_FITTED = 100  # images; with fewer, the half of what is scored tells more, where it is larger


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
    """One Result a member.

    logits: {role: (members, n, classes)} of "scored" and perhaps "fitted"; labels: {role: (n,)}.
    """
    results = []
    for number, name in enumerate(names):

        def predict(_, role, rows, number=number):
            return logits[role][number, rows]

        results.append(_result(name, "member", labels, _nothing, predict, seed))
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
        part = logits[role][:, rows]
        return average_logits(part) if average == "logits" else average_views(part)

    def fitted(role, rows):
        shares = fit_weights(logits[role][:, rows], labels[role][rows])
        shares[shares < LEAST] = 0  # what goes towards 0 gets there: that network need not run
        return (shares / shares.sum()).tolist()

    def selected(role, rows):
        chosen = greedy_selection(logits[role][:, rows], labels[role][rows])
        return [chosen.count(number) / len(chosen) for number in range(members)]

    def given(role, rows):
        return list(weights)

    def weighted(shares, role, rows):
        return average_views(logits[role][:, rows], shares)

    def result(name, fit, predict):
        return _result(name, "combination", labels, fit, predict, seed, names)

    voted, shares, ties = majority_vote(logits["scored"])
    shares.scatter_add_(1, voted.unsqueeze(1), torch.full_like(shares[:, :1], 1e-9))  # of a tie
    details = {"ties": ties}
    return [
        result("average", _nothing, mean)._replace(details={"of": average}, passes=members),
        Result("vote", "combination", voted, shares, None, [], details, members),
        result("weighted", fitted if weights is None else given, weighted),
        result("greedy", selected, weighted),
    ]


def soup_results(groups, soup, members, labels, seed) -> list[Result]:
    """A uniform and a greedy soup of each group of members that share an architecture.

    groups: lists of members' numbers. soup: a function (numbers, role, whole) -> logits
    (n, classes) of the soup of these members for a role's images, averaged over all views (whole)
    or of the first alone. Making a soup is work that the processes share: all call this. members:
    their own Results.

    A third Result of each group is the "control": its best member, made as a soup of one. What it
    gains over that member is BatchNorm's doing, and no soup's. So is a soup for which one member
    was chosen: it combines nothing, and is a control, too.
    """
    results, names, truth = [], [member.name for member in members], labels["scored"]
    for group in groups:

        def uniform(role, rows, group=group):
            return group

        def greedy(role, rows, group=group):
            def accuracy(places):
                logits = soup(sorted(group[place] for place in places), role, False)
                return (logits[rows].argmax(1) == labels[role][rows]).double().mean().item()

            return sorted(group[place] for place in greedy_ingredients(len(group), accuracy))

        def predict(chosen, role, rows):
            return soup(chosen, role, True)[rows]

        of = f" of {', '.join(names[number] for number in group)}" if len(groups) > 1 else ""
        for word, fit in (("uniform", uniform), ("greedy", greedy)):
            name = f"{word} soup{of}"
            result = _result(name, "combination", labels, fit, predict, seed)
            alone = all(len(set(chosen)) == 1 for chosen in result.details["soup"])
            results.append(result._replace(kind="control") if alone else result)
        best = max(group, key=lambda number: (members[number].labels == truth).sum().item())

        def itself(role, rows, best=best):
            return [best]

        name = f"{names[best]}, as a soup of one"
        results.append(_result(name, "control", labels, itself, predict, seed))
    return results


def _nothing(role, rows):
    return None


def _result(name, kind, labels, fit, predict, seed, names=None):
    """A Result of what is fitted by `fit` and predicted by `predict`, see `_fit_and_predict`.

    What was fitted are the weights of `names`, or else the numbers of a soup's members.
    """
    logits, calibrated, learned = _fit_and_predict(labels, fit, predict, seed)
    found = [one for one, _ in learned]
    details, passes = {}, 1
    if names and found[0] is not None:
        details = {"weights": [dict(zip(names, one, strict=True)) for one in found]}
        passes = max(sum(share > 0 for share in one) for one in found)
    elif found[0] is not None:
        details = {"soup": found}  # one list of members' numbers for each time it was fitted
    return Result(
        name, kind, logits.argmax(1), logits.softmax(1), calibrated.softmax(1),
        [temperature for _, temperature in learned], details, passes,
    )  # fmt: skip


def _fit_and_predict(labels, fit, predict, seed):
    """Logits of the scored images before and after the temperature, and all that was fitted.

    fit: (role, rows) -> anything; predict: (that, role, rows) -> logits (rows, classes).
    """

    def learn(role, rows):
        found = fit(role, rows)
        return found, fit_temperature(predict(found, role, rows), labels[role][rows])

    def show(one, rows):
        logits = predict(one[0], "scored", rows)
        return torch.stack([logits, logits / one[1]], dim=1)

    learned = []

    def learn_half(rows):
        learned.append(learn("scored", rows))
        return learned[-1]

    if "fitted" in labels:
        learned.append(learn("fitted", torch.arange(len(labels["fitted"]))))
        shown = show(learned[0], torch.arange(len(labels["scored"])))
    else:
        halves = generator(seed, "halves")
        shown = crossfit(labels["scored"], learn_half, show, halves)
    return shown[:, 0], shown[:, 1], learned

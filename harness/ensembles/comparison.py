"""Scores of members and combinations with their intervals, and whether differences are real."""

from __future__ import annotations

import math

import torch

from harness.data.sources import stored_rows
from harness.ensembles.soups import failed_soups
from harness.metrics import confusion
from harness.reports.classes import (
    MISTAKES,
    by_class,
    calibration,
    file_paths,
    mistakes,
    most_confused,
    reliability,
)
from tricks.calibration import nll
from tricks.ensemble import average_logits, average_probabilities
from tricks.significance import (
    bootstrap_interval,
    disagreement,
    error_correlation,
    holm,
    mcnemar_exact,
    oracle_accuracy,
    paired_bootstrap_interval,
)


def facts(results, logits, labels, members, images, average) -> dict:
    """The content of report.json, without views and cost.

    results: of harness.ensembles.combinations, members first. logits: (members, n, classes),
    labels: (n,) of the scored images. members: Trained. images: of harness.ensembles.members.
    average: of "probabilities" or "logits".
    """
    classes = members[0].classes
    best = best_of(results, labels, "combination" if len(members) > 1 else "member")
    matrix = confusion(best.labels, labels, len(classes))
    tables = {"as it is": reliability(best.probabilities, labels)}
    if best.calibrated is not None:
        tables["after the temperature"] = reliability(best.calibrated, labels)
    fitted = images.fitted
    answers = best.probabilities if best.calibrated is None else best.calibrated
    all_mistakes = mistakes(
        answers, best.labels, labels, stored_rows(images.scored), classes,
        lambda samples: file_paths(images.scored, images.image_column, samples),
    )  # fmt: skip
    rows = compare(results, labels)
    return {
        "members": [
            {
                "name": member.name,
                "folder": str(member.folder),
                "architecture": member.config["architecture"],
                "image_size": member.preprocessing.size,
                "weights": member.config.get("weights"),
                "bytes": (member.folder / "model.safetensors").stat().st_size,
                "sha256": member.sha256,
            }
            for member in members
        ],
        "scored": {
            "role": images.role, "split": images.scored.name, "images": len(images.scored)
        },
        "fitted": fitted and {"split": fitted.name, "images": len(fitted)},
        "notes": notes(members, images),
        "failed_soups": failed_soups(rows, members, labels),
        "results": rows,
        "best": best.name,
        "diversity": diversity(results[: len(members)], logits, labels, average),
        "by_class": by_class(matrix, classes),
        "most_confused": most_confused(matrix, classes),
        "mistakes": all_mistakes[:MISTAKES],
        "confusion": matrix.tolist(),
        "reliability": tables,
    }  # fmt: skip


def notes(members, images) -> list[str]:
    """What a reader has to know about how the members were trained, and scored before."""
    sentences = [line] if (line := _scored_before(members, images)) else []
    for member in members:
        for recipe in member.recipes:
            if "unknown" in recipe:
                sentences.append(
                    f"{member.name} started from {recipe['unknown']}: what images that was trained "
                    "on is not known"
                )
    if any(recipe.get("val_fraction") for member in members for recipe in member.recipes):
        sentences.append(
            "members kept their epoch that was best on validation images, so these are a little "
            "easier for them than new ones"
        )
    return sentences


def _scored_before(members, images):
    """The note on members whose own runs scored another part of these test images, or "".

    All are scored on the whole split here: what --max_eval_samples of a run kept depends on its
    --seed, so that no part is everybody's.
    """
    numbers = {}
    for member in members:
        data = member.config.get("data") or {}
        splits = data.get("splits")
        number = splits.get("test") if isinstance(splits, dict) else None
        same = images.role == "test" and data.get("source") == images.source
        if same and isinstance(number, int) and number != len(images.scored):
            numbers.setdefault(number, []).append(member.name)
    if not numbers:
        return ""
    words = [f"{', '.join(names)} on {number:,}" for number, names in sorted(numbers.items())]
    return (
        f"the members' own runs scored other parts of these {images.whole:,} test images "
        f"({'; '.join(words)}), here it is {len(images.scored):,}: their accuracies there are not "
        "these"
    )


def compare(results, labels) -> list[dict]:
    """What the report says of each harness.ensembles.combinations.Result, in their order.

    labels: int64 (n,). Each combination is tested against the best member: the one with the most
    images right. As the labels choose it, it is the hardest to beat. The p values of all these
    tests are corrected by Holm's method, "p_holm": the best of many combinations looks better by
    chance more often than a single one.
    """
    best = best_of(results, labels, "member")
    rows = []
    for result in results:
        right = result.labels == labels
        row = {
            "name": result.name,
            "kind": result.kind,
            "accuracy": right.double().mean().item(),
            "interval": bootstrap_interval(right),
            "correct": int(right.sum()),
            **calibration(result.probabilities, labels),
            "temperature": result.temperatures,
            "calibrated": None
            if result.calibrated is None
            else calibration(result.calibrated, labels),
            "passes": result.passes,
            **result.details,
        }  # fmt: skip
        if result.kind != "member":
            best_right = best.labels == labels
            test = mcnemar_exact(right, best_right)
            row["against"] = {
                "member": best.name,
                "gain": row["accuracy"] - best_right.double().mean().item(),
                "interval": paired_bootstrap_interval(right, best_right),
                "only_this": test.b,
                "only_member": test.c,
                "p": test.p,
            }
        rows.append(row)
    tests = [row["against"] for row in rows if "against" in row]
    for test, p_holm in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test |= {"p_holm": p_holm, "tests": len(tests)}
    return rows


def best_of(results, labels, kind):
    """The Result of a kind with the most images right; among equals, the lowest calibrated NLL."""

    def score(result):
        loss = math.inf if result.calibrated is None else nll(result.calibrated, labels)
        return (result.labels == labels).sum().item(), -loss

    return max((result for result in results if result.kind == kind), key=score)


def diversity(members, logits, labels, average) -> dict:
    """How alike the members' errors are, and what each adds to the average.

    members: their Results. logits: (members, n, classes). average: "probabilities" or "logits".
    """
    predicted = torch.stack([member.labels for member in members])
    right = predicted == labels
    mean = average_logits if average == "logits" else average_probabilities
    all_right = mean(logits).argmax(1) == labels
    gains = {}
    for number, member in enumerate(members):
        other_numbers = [n for n in range(len(members)) if n != number]
        if other_numbers:
            rest_right = mean(logits[other_numbers]).argmax(1) == labels
            gains[member.name] = {
                "gain": (all_right.double().mean() - rest_right.double().mean()).item(),
                "interval": paired_bootstrap_interval(all_right, rest_right),
            }
    return {
        "members": [member.name for member in members],
        "disagreement": disagreement(predicted).tolist(),
        "error_correlation": error_correlation(right).tolist(),
        "oracle": oracle_accuracy(right),
        "leave_one_out": gains,
    }


def view_gains(sets, labels) -> list[dict]:
    """What each set of views gains over one view: for every member, and for their average.

    sets: {kind of views: {name: predicted classes (n,)}}, "none" among them. labels: (n,).
    """
    rows = []
    for kind, predicted in sets.items():
        for name, classes in predicted.items():
            right, plain = classes == labels, sets["none"][name] == labels
            rows.append(
                {
                    "views": kind,
                    "of": name,
                    "accuracy": right.double().mean().item(),
                    "gain": (right.double().mean() - plain.double().mean()).item(),
                    "interval": paired_bootstrap_interval(right, plain),
                }
            )
    return rows

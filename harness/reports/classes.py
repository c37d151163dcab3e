"""What a classifier does class by class, as reports hold it, and the images it gets wrong."""

from __future__ import annotations

import csv
import io
import math

import torch

from harness.data.pixels import encoded
from harness.metrics import wilson_interval
from tricks.calibration import brier, expected_calibration_error, nll, reliability_table

CONFUSED = 10  # pairs of classes in a report
MISTAKES = 32  # images in a report
LEAST_ANSWERS = 50  # images that a threshold is chosen by


def by_class(matrix, classes) -> list[dict]:
    """Counts and scores of every class, from a confusion matrix (see harness.metrics.confusion).

    "accuracy" is the share of the class's images that are right: its recall. Scores are None where
    nothing was there to score; "interval" is Wilson's, 95 %, of the accuracy.
    """
    rows = []
    counts = zip(
        classes, matrix.diag().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist(), strict=True
    )
    for name, right, images, predicted in counts:
        rows.append(
            {
                "class": name,
                "images": images,
                "accuracy": right / images if images else None,
                "interval": wilson_interval(right, images) if images else None,
                "predicted": predicted,
                "precision": right / predicted if predicted else None,
                "f1": 2 * right / (images + predicted) if images + predicted else None,
            }
        )
    return rows


def most_confused(matrix, classes) -> list[dict]:
    """The pairs of classes that are taken for each other most often, both ways counted."""
    pairs = matrix.triu(1) + matrix.tril(-1).T
    order = pairs.flatten().argsort(descending=True, stable=True)[:CONFUSED].tolist()
    places = [divmod(place, len(classes)) for place in order]
    return [
        {
            "classes": [classes[a], classes[b]],
            "errors": int(pairs[a, b]),
            "first_taken_for_second": int(matrix[a, b]),
            "second_taken_for_first": int(matrix[b, a]),
        }
        for a, b in places
        if pairs[a, b]
    ]


def abstain_under(probabilities, right, accuracy=0.99) -> dict | None:
    """The lowest probability from which on answers are as often right as `accuracy` says.

    probabilities: float (n,), of the predicted class. right: bool (n,). Returns that
    {"probability", "accuracy", "answered": the share of images with at least so much}, or None:
    for fewer than LEAST_ANSWERS images, where all answers are so good, and where none are.
    """
    if len(right) < LEAST_ANSWERS or right.double().mean() >= accuracy:
        return None
    order = probabilities.argsort(descending=True)
    shares = right[order].double().cumsum(0) / torch.arange(1, len(right) + 1)
    lowest = probabilities[order]
    # an answer of the same probability as the next can't be told from it
    ends = torch.cat([lowest[:-1] != lowest[1:], torch.ones(1, dtype=torch.bool)])
    usable = (ends & (shares >= accuracy)).nonzero()
    if not len(usable) or int(usable[-1]) + 1 < LEAST_ANSWERS:
        return None
    last = int(usable[-1])
    return {
        "probability": lowest[last].item(),
        "accuracy": accuracy,
        "answered": (last + 1) / len(right),
    }


def mistakes(probabilities, predicted, labels, rows, classes, paths=None) -> list[dict]:
    """The images that are wrong, with the highest probability of what they were taken for first.

    probabilities: (n, classes). predicted and labels: int64 (n,). rows: the images' numbers in the
    stored split. paths: a function of a list of samples -> the files' paths or None, of each.
    """
    sure = probabilities.gather(1, predicted.unsqueeze(1)).squeeze(1)
    wrong = (predicted != labels).nonzero().squeeze(1)
    wrong = wrong[sure[wrong].argsort(descending=True, stable=True)].tolist()
    found = [
        {
            "sample": k,
            "row": int(rows[k]),
            "true": classes[labels[k]],
            "predicted": classes[predicted[k]],
            "probability": sure[k].item(),
        }
        for k in wrong
    ]
    for mistake, path in zip(found, paths(wrong) if paths else [], strict=bool(paths)):
        if path is not None:
            mistake["path"] = path
    return found


def file_paths(split, image_column, samples) -> list[str | None]:
    """The path of each sample's file as the data set has it; None where it has none.

    split: harness.data.sources.Split. samples: a list of their numbers in it.
    """
    cells = encoded(split.dataset, image_column)
    paths = []
    for start in range(0, len(samples), 100):  # the bytes of so many images come along
        rows = split.rows[samples[start : start + 100]]
        part = cells.select(rows).with_format("arrow")[:][image_column]
        paths += [cell["path"] if cell else None for cell in part.to_pylist()]
    return paths


def mistakes_csv(found) -> bytes:
    """`mistakes` as a table to go through and relabel, in the same order."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "row", "true", "predicted", "probability"])
    for mistake in found:
        values = [mistake[key] for key in ("row", "true", "predicted")]
        writer.writerow([mistake.get("path", ""), *values, f"{mistake['probability']:.4f}"])
    return file.getvalue().encode("utf-8", "surrogateescape")


def calibration(probabilities, labels) -> dict:
    """NLL (None where it is infinite, as of votes), Brier score, ECE in 15 bins."""
    loss = nll(probabilities, labels)
    return {
        "nll": loss if math.isfinite(loss) else None,
        "brier": brier(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
    }


def reliability(probabilities, labels) -> dict:
    """The bars of a reliability diagram, 15 bins, as lists."""
    table = reliability_table(probabilities, labels)
    return {name: values.tolist() for name, values in table._asdict().items()}

"""Scores of a classifier class by class, for reports, and the images it gets wrong."""

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
LEAST_ANSWERS = 50  # images above a threshold, to choose it by


def by_class(matrix, classes) -> list[dict]:
    """Counts and scores of every class, from a confusion matrix (see harness.metrics.confusion).

    "accuracy" is the share of the class's images that are right: its recall. Scores are None for
    classes without images; "interval" is Wilson's, 95 %, of the accuracy.
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
    """The pairs of classes that are confused most often, counted in both directions."""
    pairs = matrix.triu(1) + matrix.tril(-1).T
    order = pairs.flatten().argsort(descending=True, stable=True)[:CONFUSED].tolist()
    cells = [divmod(index, len(classes)) for index in order]
    return [
        {
            "classes": [classes[a], classes[b]],
            "errors": int(pairs[a, b]),
            "first_taken_for_second": int(matrix[a, b]),
            "second_taken_for_first": int(matrix[b, a]),
        }
        for a, b in cells
        if pairs[a, b]
    ]


def abstain_under(probabilities, right, accuracy=0.99) -> dict | None:
    """The lowest threshold on the probability above which the share `accuracy` of answers is right.

    probabilities: float (n,), of the predicted class. right: bool (n,). Returns {"probability": the
    threshold, "accuracy", "answered": the share of images with at least this probability}, or None:
    for fewer than LEAST_ANSWERS images, and where all answers reach the accuracy or none do.
    """
    if len(right) < LEAST_ANSWERS or right.double().mean() >= accuracy:
        return None
    order = probabilities.argsort(descending=True)
    shares = right[order].double().cumsum(0) / torch.arange(1, len(right) + 1)
    lowest = probabilities[order]
    # a threshold can't separate answers of equal probability
    ends = torch.cat([lowest[:-1] != lowest[1:], torch.ones(1, dtype=torch.bool)])
    usable = (ends & (shares >= accuracy)).nonzero()
    if not len(usable) or int(usable[-1]) + 1 < LEAST_ANSWERS:
        return None
    end = int(usable[-1])
    return {
        "probability": lowest[end].item(),
        "accuracy": accuracy,
        "answered": (end + 1) / len(right),
    }


def mistakes(probabilities, predicted, labels, rows, classes, paths=None) -> list[dict]:
    """The images classified wrongly, those with the highest probability first.

    probabilities: (n, classes). predicted and labels: int64 (n,). rows: the images' numbers in the
    stored split. paths: a function of a list of samples -> a list of their files' paths or None.
    """
    confidence = probabilities.gather(1, predicted.unsqueeze(1)).squeeze(1)
    samples = (predicted != labels).nonzero().squeeze(1)
    samples = samples[confidence[samples].argsort(descending=True, stable=True)].tolist()
    entries = [
        {
            "sample": k,
            "row": int(rows[k]),
            "true": classes[labels[k]],
            "predicted": classes[predicted[k]],
            "probability": confidence[k].item(),
        }
        for k in samples
    ]
    for mistake, path in zip(entries, paths(samples) if paths else [], strict=bool(paths)):
        if path is not None:
            mistake["path"] = path
    return entries


def file_paths(split, image_column, samples) -> list[str | None]:
    """The path of each sample's file in the data set; None where there is none.

    split: harness.data.sources.Split. samples: a list of their numbers in it.
    """
    cells = encoded(split.dataset, image_column)
    paths = []
    for start in range(0, len(samples), 100):  # also reads the bytes of these images
        rows = split.rows[samples[start : start + 100]]
        table = cells.select(rows).with_format("arrow")[:][image_column]
        paths += [cell["path"] if cell else None for cell in table.to_pylist()]
    return paths


def mistakes_csv(entries) -> bytes:
    """The entries of `mistakes` as a table for relabelling, in the same order."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "row", "true", "predicted", "probability"])
    for mistake in entries:
        values = [mistake[key] for key in ("row", "true", "predicted")]
        writer.writerow([mistake.get("path", ""), *values, f"{mistake['probability']:.4f}"])
    return file.getvalue().encode("utf-8", "surrogateescape")


def calibration(probabilities, labels) -> dict:
    """NLL (None where it is infinite, as for votes), Brier score, ECE in 15 bins."""
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

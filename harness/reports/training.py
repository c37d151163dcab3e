"""The report of a training run: what its network gets right and wrong, class by class."""

from __future__ import annotations

import math

import torch

from harness.cli.tables import escaped, table
from harness.data.listing import few
from harness.data.sources import stored_rows
from harness.files import replace_file
from harness.metrics import METRICS, confusion, wilson_interval
from harness.reports import charts
from harness.reports.classes import (
    MISTAKES,
    abstain_under,
    by_class,
    file_paths,
    mistakes,
    mistakes_csv,
    most_confused,
    reliability,
)
from harness.reports.sections import (
    as_json,
    class_table,
    confused_words,
    interval,
    mistake_words,
    percent,
    save_mistakes,
)
from harness.reports.slices import slices
from tricks.calibration import expected_calibration_error

WRITTEN = (
    "report.md", "report.json", "confusion.png", "reliability.png", "mistakes.png", "mistakes.csv",
)  # fmt: skip
MATRIX = 200  # classes up to which report.json holds the whole confusion matrix


def facts(
    name, role, split, samples, image_column, classes, logits, slice_by=(), fitted=None
) -> dict:
    """The content of report.json for a network's logits, float (n, classes), on one split.

    role: "test" or "val". split: harness.data.sources.Split. samples: its
    harness.data.stores.Samples. slice_by: names of harness.reports.slices. fitted: the
    content of calibration.json, or None.
    """
    logits, labels = logits.double(), samples.labels
    probabilities, predicted = logits.softmax(1), logits.argmax(1)
    right, matrix = predicted == labels, confusion(predicted, labels, len(classes))
    tables = {"as it is": reliability(probabilities, labels)}
    answers = (logits / (fitted["temperature"] if fitted else 1.0)).softmax(1)
    if fitted and role != fitted["source"]:
        tables["after the temperature"] = reliability(answers, labels)
        fitted = fitted | {"ece_scored": expected_calibration_error(answers, labels)}
    largest = int(matrix.sum(1).argmax())
    return {
        "name": name,
        "scored": {"role": role, "split": split.name, "images": len(labels)},
        "metrics": {
            key: _number(
                metric.of_all(logits, labels)
                if metric.of_all
                else metric.batch_sum(logits, labels).item() / len(labels)
            )
            for key, metric in METRICS.items()
        },
        "interval": wilson_interval(int(right.sum()), len(labels)),
        "largest_class": {
            "class": classes[largest], "share": int(matrix.sum(1)[largest]) / len(labels)
        },
        "by_class": by_class(matrix, classes),
        "most_confused": most_confused(matrix, classes),
        "slices": {
            key: slices(key, split, samples, image_column, right) for key in slice_by or ()
        },
        "mistakes": mistakes(
            answers, predicted, labels, stored_rows(split), classes,
            lambda numbers: file_paths(split, image_column, numbers),
        ),
        "confusion": matrix.tolist() if len(classes) <= MATRIX else None,
        "calibration": fitted,
        "abstain": abstain_under(answers.amax(1), right),
        "reliability": tables,
    }  # fmt: skip


def _number(value):
    return value if math.isfinite(value) else None


def write(folder, report, samples):
    """Write report.json, report.md, the pictures and mistakes.csv. report: of `facts`."""
    all_mistakes, scored = report["mistakes"], report["scored"]
    report = report | {"mistakes": all_mistakes[:MISTAKES], "wrong": len(all_mistakes)}
    replace_file(folder / "report.json", as_json(report))
    replace_file(folder / "mistakes.csv", mistakes_csv(all_mistakes))
    classes = [row["class"] for row in report["by_class"]]
    title = f"{report['name']}, {scored['images']:,} {scored['role']} images"
    charts.save_reliability(folder / "reliability.png", report["reliability"], title)
    if report["confusion"]:
        charts.save_confusion(
            folder / "confusion.png", torch.tensor(report["confusion"]), classes, title
        )
    save_mistakes(folder / "mistakes.png", report["mistakes"], samples, classes)
    replace_file(folder / "report.md", markdown(escaped(report)).encode())


def headline(report) -> str:
    """The outcome in a sentence or two."""
    scored, accuracy = report["scored"], report["metrics"]["acc"]
    selection_note = ", by which the epoch was chosen," if scored["role"] == "val" else ""
    text = (
        f"{percent(accuracy)} % of {scored['images']:,} {scored['role']} images{selection_note} "
        f"are right ({interval(report['interval'])}), balanced accuracy "
        f"{percent(report['metrics']['balanced_acc'])} %."
    )
    return text + (f" {doubt}" if (doubt := nothing_learned(report)) else "")


def nothing_learned(report) -> str:
    """A sentence if always answering the largest class would be as good, else ""."""
    largest, half_way = report["largest_class"], (1 + 1 / len(report["by_class"])) / 2
    low = report["metrics"]["balanced_acc"] < half_way  # between chance and 1
    if not low or report["interval"][0] > largest["share"]:
        return ""
    return (
        f"Always answering {largest['class']} would be right on {percent(largest['share'])} %: the "
        "accuracy does not show that anything was learned."
    )


def markdown(report) -> str:
    """report.md, from the content of report.json."""
    scores = [
        (METRICS[key].title, "-" if value is None else METRICS[key].text.format(value))
        for key, value in report["metrics"].items()
        if not (key == "top5" and len(report["by_class"]) <= 5)
    ]
    sections = [
        f"# {report['name']}",
        headline(report),
        table(("metric", "value"), scores),
        *_fold_sections(report.get("folds")),
        "Intervals are Wilson's, 95 %. Top-5, AUROC and average precision use probabilities; the "
        "last two are of one class against the rest, averaged over the classes that have images"
        + _no_image_note(report["by_class"]),
        "## Classes",
        class_table(report["by_class"]),
        confused_words(report["most_confused"]),
        "![Confusion matrix](confusion.png)" if report["confusion"] else "",
        *_slice_sections(report["slices"]),
        "## Calibration",
        _calibration_text(report),
        "![Reliability](reliability.png)",
        "## Mistakes",
        f"{report['wrong']:,} images are wrong; mistakes.csv has all of them, those with the "
        "highest probability first: wrong labels are often among these. Probabilities "
        f"are {'after the temperature' if report.get('calibration') else 'as they are'}."
        if report["wrong"]
        else "",
        mistake_words(report["mistakes"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _no_image_note(rows):
    """The end of a sentence: the classes without a scored image."""
    names = [row["class"] for row in rows if not row["images"]]
    if not names:
        return "."
    return f"; without images, so left out: {len(names):,} of {len(rows):,}, {few(names)}."


def _calibration_text(report):
    text = f"Expected calibration error {percent(report['metrics']['ece'])} % in 15 bins"
    fitted = report.get("calibration")
    if not fitted:
        return f"{text}; no images were held out to fit a temperature on."
    if "ece_scored" in fitted:
        text += f", {percent(fitted['ece_scored'])} % after the temperature"
    return (
        f"{text}. The temperature, {fitted['temperature']:.3f}, was fitted on "
        f"{fitted['images']:,} {fitted['source']} images (there "
        f"{percent(fitted['ece_before'])} % before and {percent(fitted['ece_after'])} % after); "
        "calibration.json has it."
    )


def _fold_sections(folds):
    if not folds:
        return []
    cells = [
        (f["fold"], f["run"], f"{f['images']:,}", percent(f["accuracy"]), interval(f["interval"]))
        for f in folds
    ]
    return [
        "Every image is scored by the run that held it out.",
        table(("fold", "run", "images", "accuracy %", "95 % interval"), cells),
    ]


def _slice_sections(slices_by_name):
    sections = ["## Slices"] if slices_by_name else []
    for name, rows in slices_by_name.items():
        cells = [
            (r["group"], f"{r['images']:,}", percent(r["accuracy"], 1), interval(r["interval"]))
            for r in rows
        ]
        sections.append(table((name, "images", "accuracy %", "95 % interval"), cells))
    return sections

"""The output of predict.py: a row for each image, a sheet of the first images, a summary."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import NamedTuple

import torch

from harness.cli.tables import facts
from harness.console import one_line
from harness.data.stores import evaluation_image
from harness.files import replace_file
from harness.metrics import wilson_interval
from harness.pictures import drawable, save_tiles
from harness.reports.sections import interval, percent

SHEET = 32  # images on predictions.png
LINES = 20  # images up to which each has a line on the terminal


@dataclass(frozen=True)
class PredictionOptions:
    """The flags that say what is reported of each image."""

    top_k: int
    min_probability: float
    coverage: float
    format: str
    tta: str


class Prediction(NamedTuple):
    """What an image's probabilities are reduced to."""

    classes: list[int]  # the likeliest, as many as --top_k
    probabilities: list[float]
    label_set: list[int] | None  # of --coverage
    true: float | None  # the probability of the true class, where it is known


def keeper(top_k, sets, labels):
    """A function (numbers, probabilities) -> Predictions, for probabilities_of."""

    def keep(index, probabilities):
        best = probabilities.topk(min(top_k, probabilities.shape[1]))
        label_sets = sets.of(probabilities) if sets else [None] * len(index)
        true = [None] * len(index)
        if labels is not None:
            true = probabilities.gather(1, labels[index].unsqueeze(1)).squeeze(1).tolist()
        rows = zip(best.indices.tolist(), best.values.tolist(), label_sets, true, strict=True)
        return [Prediction(*row) for row in rows]

    return keep


def rows_of(images, predictions, reasons, classes, options):
    """A dict for each image, in order: the rows of predictions.csv, .jsonl and .parquet.

    reasons: {number: why} of unreadable images. options: PredictionOptions, here and below.
    """
    for k, (name, prediction) in enumerate(zip(images.names, predictions, strict=True)):
        row = {"image": name}
        if images.labels is not None:
            row["true"] = classes[images.labels[k]]
        for rank in range(min(options.top_k, len(classes))):
            label, probability = None, None
            if prediction:
                label = classes[prediction.classes[rank]]
                probability = round(prediction.probabilities[rank], 6)
            row |= {f"class_{rank + 1}": label, f"probability_{rank + 1}": probability}
        if options.min_probability:
            sure = prediction and prediction.probabilities[0] >= options.min_probability
            row["abstain"] = None if not prediction else not sure
        if options.coverage:
            row["set"] = prediction and [classes[label] for label in prediction.label_set]
        row["error"] = reasons.get(k)
        yield row


def write(folder, rows, images, predictions, classes, runs, options, summary):
    """Write predictions.csv (or .jsonl, .parquet), predictions.png and summary.json."""
    name = f"predictions.{options.format}"
    for format in WRITERS:
        if format != options.format:
            (folder / f"predictions.{format}").unlink(missing_ok=True)
    replace_file(folder / name, WRITERS[options.format](rows))
    replace_file(folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    save_sheet(folder / "predictions.png", images, predictions, classes, runs[0].preprocessing)


def _as_csv(rows):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        cells = ["" if v is None else "|".join(v) if isinstance(v, list) else v
                 for v in row.values()]  # fmt: skip
        writer.writerow(cells)
    return file.getvalue().encode("utf-8", "surrogateescape")


def _as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _as_parquet(rows):
    import pyarrow
    import pyarrow.parquet

    def safe(value):  # a file's name need not be Unicode
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    rows = [{name: safe(value) for name, value in row.items()} for row in rows]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


WRITERS = {"csv": _as_csv, "jsonl": _as_jsonl, "parquet": _as_parquet}


def save_sheet(path, images, predictions, classes, preprocessing):
    """Save a picture of the first images with their predicted classes."""
    numbers = [k for k, prediction in enumerate(predictions) if prediction][:SHEET]
    size, tiles, captions = preprocessing.size, [], []
    for k in numbers:
        pixels = evaluation_image(images.read(k), preprocessing, images.bit_depth)
        start = round((pixels.shape[-1] - size) / 2)
        tiles.append(pixels[:, start : start + size, start : start + size])
        best, probability = predictions[k].classes[0], predictions[k].probabilities[0]
        lines = [(drawable(classes[best], best), f" {probability:.2f}")]
        if images.labels is not None and int(images.labels[k]) != best:
            label = int(images.labels[k])
            lines.append((f"true: {drawable(classes[label], label)}", ""))
        captions.append(lines)
    path.unlink(missing_ok=True)
    if tiles:
        save_tiles(path, torch.stack(tiles), captions)


def summarise(images, predictions, reasons, networks, sets, options):
    """summary.json: counts, and scores where labels are known."""
    readable = [(k, p) for k, p in enumerate(predictions) if p]
    summary = {
        "images": len(images),
        "unreadable": {images.names[k]: reason for k, reason in reasons.items()},
        "runs": [
            {"folder": str(n.trained.folder), "temperature": n.temperature,
             "calibrated": n.calibrated}
            for n in networks
        ],
    }  # fmt: skip
    sure = [(k, p) for k, p in readable if p.probabilities[0] >= (options.min_probability or 0)]
    if options.min_probability:
        summary["abstained"] = len(readable) - len(sure)
    if sets:
        summary["sets"] = sets._asdict() | {
            "mean_size": sum(len(p.label_set) for _, p in readable) / max(1, len(readable)),
            "empty": sum(not p.label_set for _, p in readable),
        }
    if images.labels is not None:
        labels, count = images.labels.tolist(), len(readable)
        for name, group in {
            "all": readable,
            **({"sure": sure} if options.min_probability else {}),
        }.items():
            hits = sum(p.classes[0] == labels[k] for k, p in group)
            summary.setdefault("accuracy", {})[name] = {
                "images": len(group), "right": hits, "accuracy": hits / max(1, len(group)),
                "interval": wilson_interval(hits, len(group)),
            }  # fmt: skip
        if sets:
            hits = sum(labels[k] in p.label_set for k, p in readable)
            summary["sets"] |= {
                "held": hits / max(1, count), "interval": wilson_interval(hits, count),
            }  # fmt: skip
    return summary


def plan(images, networks, sets, options, machine) -> str:
    """What is about to happen, one fact on each line."""
    rows = []
    for network in networks:
        trained = network.trained
        calibration = (
            f"temperature {network.temperature:.3f}"
            if network.calibrated
            else "no calibration.json: probabilities as they are"
        )
        text = f"{trained.config['architecture']}, {trained.preprocessing.size} px"
        text += f", {len(trained.classes):,} classes; {calibration}"
        rows.append(("network", f"{trained.name}: {text}"))
    labels = "not known" if images.labels is None else "known: predictions are scored"
    rows.append(("images", f"{len(images):,}: {images.source}; labels {labels}"))
    if options.tta != "none":
        rows.append(("views", options.tta))
    if sets:
        rows.append(("sets", f"{sets.kind} sets that hold the class of at least "
                     f"{sets.coverage:.4g} of images like the {sets.images:,} {sets.source} "
                     f"(score ≤ {sets.threshold:.4f})"))  # fmt: skip
    rows.append(("precision", machine["precision"]))
    rows.append(("device", f"{machine['device']}, {machine['threads']} CPU threads a process"))
    return facts(rows)


def lines_of(rows, options):
    """A line for each image or, where there are many, the number of images of each class."""
    if len(rows) <= LINES:
        for row in rows:
            if row["error"]:
                continue
            classes = [
                f"{row[f'class_{k}']} {row[f'probability_{k}']:.2f}"
                for k in range(1, 1 + options.top_k)
                if row.get(f"class_{k}") is not None
            ]
            text = f"{row['image']}   {', '.join(classes)}"
            text += "   abstains" if row.get("abstain") else ""
            text += (
                f"   set: {', '.join(row['set']) or 'empty'}" if row.get("set") is not None else ""
            )
            yield one_line(text)
        return
    counts = {}
    for row in rows:
        if row["class_1"] is not None:
            counts[row["class_1"]] = counts.get(row["class_1"], 0) + 1
    ranking = sorted(counts.items(), key=lambda item: -item[1])
    for name, count in ranking[:LINES]:
        yield one_line(f"{count:>8,}  {name}")
    if len(counts) > LINES:
        yield f"          and {len(counts) - LINES:,} other classes"


def closing(folder, summary, options):
    """The last lines: images that can't be read, the scores, where the files are."""
    lines = []
    unreadable = summary["unreadable"]
    for name, reason in list(unreadable.items())[:10]:
        lines.append(one_line(f"unreadable   {name}: {reason}"))
    if len(unreadable) > 10:
        lines.append(f"unreadable   and {len(unreadable) - 10:,} others, see the column error")
    for name, score in summary.get("accuracy", {}).items():
        title = (
            "accuracy" if name == "all" else f"of those with at least {options.min_probability:g}"
        )
        lines.append(
            f"{title:<12} {percent(score['accuracy'])} % of {score['images']:,} "
            f"({interval(score['interval'])})"
        )
    if "abstained" in summary:
        readable = summary["images"] - len(unreadable)
        lines.append(f"abstained    {summary['abstained']:,} of {readable:,}")
    if "sets" in summary:
        sets = summary["sets"]
        score = (
            f", {percent(sets['held'])} % hold the class ({interval(sets['interval'])})"
            if ("held" in sets)
            else ""
        )
        lines.append(f"sets         {sets['mean_size']:.2f} classes on average{score}")
    lines.append(
        f"predictions  {folder}/predictions.{options.format}, predictions.png, summary.json"
    )
    return "\n".join(lines)

"""Parts of a report in Markdown, and the picture of the mistakes."""

from __future__ import annotations

import json
import re

import torch

from harness.cli.tables import table
from harness.pictures import drawable, save_tiles

SHOWN = 10  # mistakes in a table
MOST_CLASSES = 60  # in a table; of more, those with the lowest accuracy


def as_json(report) -> bytes:
    """report.json: indented, lists of numbers on one line each."""
    text = json.dumps(report, indent=1) + "\n"
    lists = r"\[\s+([-\d.e,\s]+?)\s+\]"
    return re.sub(lists, lambda numbers: f"[{' '.join(numbers[1].split())}]", text).encode()


def percent(value, digits=2):
    """0.1234 as "12.34", None as "-"."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def interval(pair):
    """(0.1, 0.2) as "10.00–20.00", None as "-"."""
    return "-" if pair is None else f"{percent(pair[0])}–{percent(pair[1])}"


def energy(joules) -> str:
    """360 as "360 J", 7200 as "2.0 Wh"."""
    return f"{joules:,.0f} J" if joules < 3600 else f"{joules / 3600:,.1f} Wh"


def class_table(rows) -> str:
    """rows: of harness.reports.classes.by_class; the lowest accuracy first."""
    scored = sorted((r for r in rows if r["images"]), key=lambda row: row["accuracy"])
    table_rows = [*scored, *(r for r in rows if not r["images"])][:MOST_CLASSES]
    text = table(
        ("class", "images", "accuracy %", "95 % interval", "precision %", "F1 %", "predicted"),
        [
            (
                r["class"], f"{r['images']:,}", percent(r["accuracy"], 1),
                interval(r["interval"]) if r["interval"] else "-", percent(r["precision"], 1),
                percent(r["f1"], 1), f"{r['predicted']:,}",
            )
            for r in table_rows
        ],
    )  # fmt: skip
    if len(table_rows) < len(rows):
        text += f"\n\nThe lowest {len(table_rows)} of {len(rows):,} classes; report.json has all."
    return text


def confused_words(pairs) -> str:
    """pairs: of harness.reports.classes.most_confused."""
    if not pairs:
        return "No two classes are confused."
    rows = [
        (" ~ ".join(p["classes"]), p["errors"], p["first_taken_for_second"],
         p["second_taken_for_first"]) for p in pairs
    ]  # fmt: skip
    return table(("most confused", "errors", "first for second", "second for first"), rows)


def mistake_words(mistakes) -> str:
    """mistakes: of harness.reports.classes.mistakes; mistakes.png has been drawn."""
    if not mistakes:
        return "All images are right."
    names = [m.get("path") or f"row {m['row']} of the stored split" for m in mistakes[:SHOWN]]
    rows = [
        (name, m["true"], m["predicted"], f"{m['probability']:.3f}")
        for name, m in zip(names, mistakes, strict=False)
    ]
    return (
        "![The most confident mistakes](mistakes.png)\n\n"
        + table(("image", "true", "predicted", "probability"), rows)
    )  # fmt: skip


def save_mistakes(path, mistakes, samples, classes):
    """Draw the mistakes; without one, there is no such picture.

    mistakes: of harness.reports.classes.mistakes. samples: harness.data.stores.Samples.
    """
    path.unlink(missing_ok=True)
    if not mistakes:
        return
    images, _ = samples.take(torch.tensor([m["sample"] for m in mistakes]), torch.device("cpu"))
    names = {name: drawable(name, k) for k, name in enumerate(classes)}
    captions = [
        [
            ("true: " + names[m["true"]], ""),
            ("predicted: " + names[m["predicted"]], f" {m['probability']:.2f}"),
        ]
        for m in mistakes
    ]
    save_tiles(path, images, captions)

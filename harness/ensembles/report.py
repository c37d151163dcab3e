"""The report of ensemble_eval.py: the plan, the terminal's table, report.md and its pictures."""

from __future__ import annotations

import hashlib

import torch

from harness.cli.tables import escaped, facts, table
from harness.ensembles.combinations import LEAST_FITTED
from harness.ensembles.comparison import notes
from harness.ensembles.soups import from_different_starts
from harness.files import file_name, replace_file
from harness.reports import charts
from harness.reports.sections import (
    as_json,
    class_table,
    confused_words,
    interval,
    mistake_words,
    percent,
    save_mistakes,
)
from tricks.calibration import COLDEST

PICTURES = ("accuracy", "reliability", "confusion", "mistakes")


def default_name(names) -> str:
    """ "ensemble-a+b+c"; a name over 100 bytes is cut and ends in a hash."""
    name = "ensemble-" + "+".join(file_name(member) for member in names)
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name.encode()) <= 100 else f"{file_name(name, 90)}-{digest}"


def plan(members, images, kinds, groups, machine) -> str:
    """The plan, one fact a line."""
    rows = [("member", f"{_about(member)}") for member in members]
    cut = f" of {images.whole:,}" if len(images.scored) < images.whole else ""
    rows.append(("scored", f"{len(images.scored):,}{cut} {images.role} images of {images.source}"))
    if images.fitted:
        fit_images = f"on {len(images.fitted):,} validation images that no member was trained on"
    else:
        fit_images = (
            f"cross-fitted on the {images.role} images: under {LEAST_FITTED} others are left"
        )
    rows.append(("fitted", fit_images))
    rows.append(("views", ", ".join(kinds)))
    for group in groups:
        parts = [members[number] for number in group]
        words = " + ".join(part.name for part in parts)
        if from_different_starts(parts):
            words += ": from different starts, which rarely average; --no_soup saves the passes"
        rows.append(("soup", words))
    rows.append(("precision", machine["precision"]))
    rows.append(("device", f"{machine['device']}, {machine['threads']} CPU threads a process"))
    if any(kind in ("flip", "shift", "crops:10") or "random" in kind for kind in kinds):
        for member in members:
            if member.recipes[0].get("mirrored") is False:
                rows.append(("note", f"{member.name} was trained without mirrored images"))
    rows += [("note", line) for line in notes(members, images)]
    return facts(rows)


def _about(member):
    size = f"{member.preprocessing.size} px"
    text = f"{member.name}: {member.config['architecture']}, {size}, {len(member.classes)} classes"
    return text + (f"; {member.note}" if member.note else "")


def write(folder, report, samples):
    """report.json, report.md and the pictures.

    report: the content of report.json. samples: harness.data.stores.Samples of the scored images.
    """
    (folder / "mistakes.csv").unlink(missing_ok=True)  # of a cross-validation that this replaces
    replace_file(folder / "report.json", as_json(report))
    replace_file(folder / "report.md", markdown(escaped(report)).encode())
    classes = [row["class"] for row in report["by_class"]]
    scored, best = report["scored"], report["best"]
    images_text = f"{scored['images']:,} {scored['role']} images"
    charts.save_accuracies(
        folder / "accuracy.png", report["results"], f"{images_text}, views: {report['views']}"
    )
    charts.save_reliability(
        folder / "reliability.png", report["reliability"], f"{best}, {images_text}"
    )
    matrix = torch.tensor(report["confusion"])
    charts.save_confusion(folder / "confusion.png", matrix, classes, f"{best}, {images_text}")
    save_mistakes(folder / "mistakes.png", report["mistakes"], samples, classes)


def signed(value):
    return f"{100 * value:+.2f}"


def p_value(value):
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


HEADER = ("", "accuracy %", "95 % interval", "NLL", "Brier", "ECE %", "T", "gain", "p (Holm)",
          "networks")  # fmt: skip


def results_table(rows) -> str:
    """Members and combinations; rows: of harness.ensembles.comparison.compare."""

    def cells(row):
        against = row.get("against")
        return (
            row["name"], percent(row["accuracy"]), interval(row["interval"]),
            _number(row["nll"]), _number(row["brier"]), percent(row["ece"]),
            " / ".join(f"{t:.2f}" for t in row["temperature"]) or "-",
            signed(against["gain"]) if against else "",
            p_value(against["p_holm"]) if against else "",
            row["passes"],
        )  # fmt: skip

    return table(HEADER, map(cells, rows))


def _number(value):
    return "-" if value is None else f"{value:.4f}"


def tags(members) -> list[str]:
    """Tags for the trackers: the data set and the architectures."""
    return list(dict.fromkeys(
        str(m.config.get(key)) for key in ("dataset", "architecture") for m in members
    ))  # fmt: skip


def track(tracking, report, folder):
    """Tables, pictures and the summary for the trackers, and the end of their run."""
    rows = report["results"]
    columns = ["name", "kind", "accuracy", "low", "high", "nll", "brier", "ece", "gain", "p",
               "p_holm"]  # fmt: skip
    tracking.log_table("results", columns, [
        [row["name"], row["kind"], row["accuracy"], *row["interval"], row["nll"], row["brier"],
         row["ece"], *(row.get("against", {}).get(key) for key in ("gain", "p", "p_holm"))]
        for row in rows
    ])  # fmt: skip
    tracking.log_table(
        "mistakes", ["row", "true", "predicted", "probability"],
        [[m["row"], m["true"], m["predicted"], m["probability"]] for m in report["mistakes"]],
    )  # fmt: skip
    for name in PICTURES:
        if (folder / f"{name}.png").exists():
            tracking.log_image(name, folder / f"{name}.png", 0)
    role = report["scored"]["role"]
    tracking.summary(
        {f"{role}/acc/{row['name']}": row["accuracy"] for row in rows}
        | {"best": report["best"], "oracle": report["diversity"]["oracle"]}
    )
    tracking.finish()


def answer(report) -> str:
    """The tables and the outcome, for the terminal."""
    sections = [results_table(report["results"])]
    if len(report["cost"]["images_per_second"]) > 1:
        sections.append(view_table(report["view_gains"], report["cost"]["images_per_second"]))
    sections += report["failed_soups"]
    sections += [how_fitted(report).replace("**", ""), headline(report)]
    return "\n" + "\n\n".join(sections) + "\n"


def closing(folder, tracking_line) -> str:
    """The last lines on the terminal: where the report and the tracked run are."""
    pictures = [f"{name}.png" for name in PICTURES if (folder / f"{name}.png").exists()]
    files = ", ".join(["report.md", "report.json", *pictures])
    return f"report       {folder}/{files}\ntracked run  {tracking_line}"


def headline(report) -> str:
    """The outcome in one sentence."""
    best = next(row for row in report["results"] if row["name"] == report["best"])
    kind = "combination" if "against" in best else "accuracy"
    sentence = f"best {kind} on {report['scored']['role']}: {best['name']}, "
    sentence += f"{percent(best['accuracy'])} % ({interval(best['interval'])})"
    against = best.get("against")
    if not against:
        return sentence
    side = "over" if against["gain"] >= 0 else "below"
    sentence += (
        f", {percent(abs(against['gain']))} points {side} the best member {against['member']} "
        f"({signed(against['interval'][0])} to {signed(against['interval'][1])}, McNemar's p = "
        f"{p_value(against['p_holm'])}"
    )
    if against["tests"] > 1:
        sentence += f" after Holm's correction for {against['tests']} tests"
    return sentence + (")" if against["p_holm"] < 0.05 else ": chance is not ruled out)")


def how_fitted(report) -> str:
    """Which images weights, selections and temperatures were fitted on, in sentences."""
    scored, fitted = report["scored"], report["fitted"]
    if fitted:
        return (
            f"Weights, selections and temperatures were fitted on {fitted['images']:,} validation "
            f"images of split '{fitted['split']}' that no member was trained on, and scored on the "
            f"{scored['images']:,} images of split '{scored['split']}'."
        )
    lead = (
        "The scored images are those that members held out and none was trained on, so no others "
        "are left to fit anything on."
        if scored["role"] == "val"
        else f"Under {LEAST_FITTED} validation images are left that no member was trained on."
    )
    return (
        f"{lead} So weights, selections and temperatures are **cross-fitted on the "
        f"{scored['role']} images**: each half of the {scored['images']:,} is scored with what was "
        "fitted on the other half. Where two values are given, each half has its own."
    )


def markdown(report) -> str:
    """report.md, from the content of report.json."""
    rows = report["results"]
    sections = [
        f"# {report['name']}",
        f"{headline(report)[0].upper()}{headline(report)[1:]}.",
        f"{len(report['members'])} members on {report['source']}; views: {report['views']}; "
        f"{report['precision']}. {how_fitted(report)}",
        *(f"Note: {line}." for line in [*report["notes"], *report["failed_soups"]]),
        "![Accuracies](accuracy.png)",
        "## Members and combinations",
        results_table(rows),
        "*gain*: points over the best member. *p (Holm)*: the exact p of McNemar's test, by Holm's "
        "correction for all tests of this table, since the best of many combinations looks better "
        "by chance more often than a single one; report.json also has the p values without it. The "
        "best member is the one with the most scored images right: the hardest to beat, as it was "
        "chosen knowing the labels. The best combination was chosen in the same way: a difference "
        "inside the intervals is noise. *T*: the temperature that the next table applies. "
        "*networks*: forward passes an image, for each view.",
        "## Calibration",
        _calibration_table(rows),
        _unbounded_text(rows),
        "![Reliability](reliability.png)",
    ]
    if len(report["members"]) > 1:
        sections += ["## How they were combined", _fit_text(rows, report["members"])]
        sections += ["## Diversity", _diversity_text(report["diversity"])]
    sections += ["## Test-time augmentation", _view_text(report)]
    sections += [
        f"## Classes and errors of {report['best']}",
        "![Confusion matrix](confusion.png)",
        class_table(report["by_class"]),
        confused_words(report["most_confused"]),
        mistake_words(report["mistakes"]),
        "## Members",
        _member_table(report["members"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _calibration_table(rows):
    def cells(row):
        raw, calibrated = row, row["calibrated"]
        return (
            row["name"], " / ".join(f"{t:.3f}" for t in row["temperature"]),
            _number(raw["nll"]), _number(calibrated["nll"]), _number(raw["brier"]),
            _number(calibrated["brier"]), percent(raw["ece"]), percent(calibrated["ece"]),
        )  # fmt: skip

    header = ("", "T", "NLL", "after", "Brier", "after", "ECE %", "after")
    return table(header, [cells(row) for row in rows if row["calibrated"]])


def _unbounded_text(rows):
    names = [row["name"] for row in rows if COLDEST in row["temperature"]]
    if not names:
        return ""
    return (
        f"A temperature of {COLDEST:g} ({', '.join(names)}) says that all images it was fitted on "
        "were right: nothing kept the fit from making the network as sure as possible."
    )


def _fit_text(rows, members):
    lines = []
    for row in rows:
        if "of" in row:
            lines.append(f"- {row['name']}: of {row['of']}")
        if "ties" in row:
            lines.append(f"- {row['name']}: {row['ties']:,} ties, broken by summed probability")
        for half, shares in enumerate(row.get("weights", []), start=1):
            text = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
            half_note = f" (scoring half {half})" if len(row["weights"]) > 1 else ""
            lines.append(f"- {row['name']}{half_note}: {text}")
        if "soup" in row:
            soups = [", ".join(members[number]["name"] for number in soup) for soup in row["soup"]]
            text = " / ".join(soups)
            lines.append(f"- {row['name']}: weights of {text}, BatchNorm measured anew")
    if any(row["kind"] == "control" for row in rows):
        lines.append(
            "- a soup of one is the control of the soups: what it gains over its member comes from "
            "BatchNorm's statistics, measured on images that are not augmented"
        )
    return "\n".join(lines)


def _diversity_text(diversity):
    names = diversity["members"]

    def square(title, values, show):
        rows = [(n, *map(show, row)) for n, row in zip(names, values, strict=True)]
        return table((title, *names), rows)

    gains = [
        (name, signed(row["gain"]), f"{signed(row['interval'][0])} to {signed(row['interval'][1])}")
        for name, row in diversity["leave_one_out"].items()
    ]
    return "\n\n".join(
        [
            f"At least one member is right on {percent(diversity['oracle'])} % of the images.",
            square("% of images on which they differ", diversity["disagreement"], percent),
            square("correlation of errors", diversity["error_correlation"], "{:.3f}".format),
            table(("what a member adds to the average", "points", "95 % interval"), gains),
        ]
    )


def view_table(rows, cost) -> str:
    """Gain and cost of every set of views; rows: of harness.ensembles.comparison.view_gains."""

    def cells(row):
        speed = cost[row["views"]][row["of"]]
        gain = ("", "") if row["views"] == "none" else (
            signed(row["gain"]), f"{signed(row['interval'][0])} to {signed(row['interval'][1])}"
        )  # fmt: skip
        return (row["views"], row["of"], percent(row["accuracy"]), *gain, f"{speed:,.0f}")

    header = ("views", "of", "accuracy %", "gain", "95 % interval", "images/s")
    return table(header, map(cells, rows))


def _view_text(report):
    return (
        view_table(report["view_gains"], report["cost"]["images_per_second"])
        + f"\n\nimages/s: forward passes on {report['cost']['device']}, as measured when they "
        "were made."
    )


def _member_table(members):
    rows = [
        (m["name"], m["architecture"], f"{m['image_size']} px", f"{m['bytes'] / 1e6:,.1f}",
         m["weights"], m["folder"]) for m in members
    ]  # fmt: skip
    return table(("", "architecture", "images", "MB", "weights", "folder"), rows)

"""The report of gradcam.py: the plan, the pictures, the maps, report.json and report.md."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass

from harness.cli import flags
from harness.cli.tables import escaped, facts, table
from harness.explain.cams import heat_of, to_input
from harness.explain.sheets import Strip, overlay, save_sheet
from harness.files import file_name, has_file, replace_file, to_bytes
from harness.models.trained import add_to_folder
from harness.pictures import drawable
from harness.reports import page
from harness.tracking import Tracking, TrackingOptions
from tricks.cam_layers import spatial_layers

DRAWN = 8  # classes of an image with --all_classes
ON_SHEET = 32  # images
COARSE = 4  # positions a side below which a map says little
LARGE = 16  # classes of an image up to which maps are saved at the image's resolution, too
TRACKED = 64  # images in the trackers' table


def plan(network, pictures, methods, machine) -> str:
    """What is about to happen, one fact on each line."""
    preprocessing, note = network.preprocessing, network.run and network.run.note
    calibrated = f"temperature {network.temperature:.3f}" if network.temperature != 1 else ""
    rows = {
        "network": f"{network.name}, {preprocessing.size} px, {len(network.classes)} classes"
        + "".join(f"; {text}" for text in (network.description, calibrated, note) if text),
        "images": f"{len(pictures)}, {pictures[0].source} to {pictures[-1].source}",
        "methods": ", ".join(methods),
        "device": f"{machine['device']}, {machine['threads']} CPU threads a process; maps in fp32",
    }
    return facts(rows.items())


@dataclass(frozen=True)
class SheetOptions(TrackingOptions):
    """The flags that say how the maps are drawn and where the report is tracked."""

    alpha: float
    all_classes: bool


def write(options, accelerator, folder, network, pictures, explained, colour, of_data_set):
    """Write the whole report into its folder, and send it to the trackers.

    options: SheetOptions. of_data_set: whether the pictures are of the run's own data set.
    """
    (folder / "panels").mkdir(exist_ok=True)
    for file in (folder / "panels").glob("*.png"):
        file.unlink()
    size = network.preprocessing.size
    rows = [_row(k, network, picture, explained) for k, picture in enumerate(pictures)]
    strips = [
        _strip(options, network, picture, row, explained, k, colour)
        for k, (picture, row) in enumerate(zip(pictures, rows, strict=True))
    ]
    for strip, row in zip(strips, rows, strict=True):
        save_sheet(folder / "panels" / row["panel"], [strip])
    layer = _layer_text(network, explained)
    summary = _checks(explained)
    excerpt = f"; the first {ON_SHEET} of {len(strips)} images" if len(strips) > ON_SHEET else ""
    heading = [(f"{network.name}: {layer}{excerpt}", "")]
    heading += [(f"{method}: {text}", "") for method, text in _summary_texts(summary).items()]
    save_sheet(folder / "sheet.png", strips[:ON_SHEET], heading)
    tensors = {f"{method}/layer": maps for method, maps in explained.maps.items()}
    if explained.classes.shape[1] <= LARGE:
        large = {f"{method}/image": heat_of(maps, size) for method, maps in explained.maps.items()}
        tensors |= large
    tensors |= {"classes": explained.classes, "probabilities": explained.probabilities}
    replace_file(folder / "maps.safetensors", to_bytes(tensors))
    report = {
        "network": network.name,
        "layer": explained.layer,
        "map_size": list(next(iter(explained.maps.values())).shape[-2:]),
        "image_size": size,
        "methods": list(explained.maps),
        "checks": summary,
        "images": rows,
    }
    replace_file(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    replace_file(folder / "report.md", _markdown(escaped(report), layer).encode())
    replace_file(folder / "config.yaml", flags.to_yaml(options.recipe))
    page_note = _add_to_page(network.run, folder) if of_data_set else ""
    tracking = Tracking(
        accelerator, options, folder=folder, job_type="gradcam", tags=[network.name]
    )
    _track(tracking, report, folder)
    print(f"{'layer':<12} {layer.removeprefix('layer ')}")
    if max(report["map_size"]) < COARSE:
        print(f"{'':<12} coarse maps{_finer_layer(network, pictures[0])}")
    for row in rows:
        for method in row["empty"]:
            print(f"{'no heat':<12} {row['source']}: {method} is zero everywhere")
    for method, text in _summary_texts(summary).items():
        print(f"{method:<12} {text}")
    files = "sheet.png, panels/, maps.safetensors, report.md, report.json"
    print(f"report       {folder}/{files}{page_note}\ntracked run  {tracking.line}")


def _finer_layer(network, picture):
    """A hint at the last layer whose maps are not coarse; "" where there is none."""
    images = to_input(network, [picture], next(network.model.parameters()).device)
    finer = [
        layer.name
        for layer in spatial_layers(network.model, images)
        if min(layer.height, layer.width) >= 2 * COARSE and not layer.is_pool
    ]
    return f": --layer {finer[-1]} --method layercam shows more" if finer else ""


def _add_to_page(run, folder):
    """Put the maps into the report.html of a run; returns a phrase that says so, or ""."""
    if not has_file(run.folder / page.FILE):
        return ""
    file, maps = run.folder / page.FILE, folder / "sheet.png"
    warning = f"the maps are not in {file}"
    success = add_to_folder(run, lambda: page.write_page(run.folder, run, maps), warning)
    return f"; {file} shows them" if success else ""


def _row(k, network, picture, explained):
    """What report.json says of an image."""
    probabilities = explained.probabilities[k]
    predicted = int(probabilities.argmax())
    true = picture.true
    names = network.classes
    labels = [true, predicted] if true is not None else [predicted]
    slugs = [file_name(names[label].replace(".", "_"), 40) for label in labels]
    return {
        "source": picture.source,
        "true": None if true is None else names[true],
        "p_true": None if true is None else probabilities[true].item(),
        "predicted": names[predicted],
        "p_predicted": probabilities[predicted].item(),
        "targets": [names[c] for c in explained.classes[k].tolist()],
        "panel": f"{k:04d}-{'-as-'.join(slugs)}.png",
        "predicted_id": predicted,
        "empty": [
            f"{method} of {names[c]}"
            for method, maps in explained.maps.items()
            for c, class_map in zip(explained.classes[k].tolist(), maps[k], strict=True)
            if not class_map.relu().any()
        ],
        "checks": explained.checks[k],
    }


def _strip(options, network, picture, row, explained, k, colour):
    """An image, its heat and overlays; with one method and one class the heat alone, too."""
    pixels = picture.pixels.permute(1, 2, 0).numpy()
    panels = [(pixels, [("image", ""), ("", "")])]
    classes = explained.classes[k].tolist()
    columns = sorted(range(len(classes)), key=lambda c: -explained.probabilities[k, classes[c]])
    columns = columns[:DRAWN] if options.all_classes else sorted(columns[:DRAWN])
    is_single = len(explained.maps) * len(columns) == 1
    for method, maps in explained.maps.items():
        heat = heat_of(maps[k, columns], network.preprocessing.size).numpy()
        for c, values in zip(columns, heat, strict=True):
            name = drawable(network.classes[classes[c]], classes[c])
            lines = [(method, ""), (name, f" ({explained.probabilities[k, classes[c]]:.2f})")]
            if not values.any():
                lines[0] = (f"{method}: no heat", "")
            if is_single:
                panels.append((colour(values), lines))
                lines = [("overlay", ""), ("", "")]
            panels.append((overlay(pixels, values, colour, options.alpha), lines))
    predicted = row["predicted_id"]
    title = [(picture.source, "")]
    if picture.true is not None:
        title[0] = (picture.source, ": right" if picture.true == predicted else ": wrong")
        title.append((f"true {drawable(row['true'], picture.true)}", f" ({row['p_true']:.2f})"))
    name = drawable(row["predicted"], predicted)
    title.append((f"predicted {name}", f" ({row['p_predicted']:.2f})"))
    checks = explained.checks[k].items()
    notes = [(f"{method}: {_check_text(values)}", "") for method, values in checks]
    return Strip(title, panels, notes)


def _check_text(values):
    text = f"del {values['deletion']:.2f} ({values['deletion_random']:.2f}), "
    text += f"ins {values['insertion']:.2f} ({values['insertion_random']:.2f})"
    text += "" if values["randomised"] is None else f", ρ {values['randomised']:+.2f}"
    if "heat_in_region" in values:
        text += f", in region {values['heat_in_region']:.0%} of {values['region']:.0%}"
    return text


def _checks(explained):
    """Means over the images of what --check measured, by method."""
    summary = {}
    for method in explained.checks[0]:
        images = [checks[method] for checks in explained.checks]
        summary[method] = {}
        for key in dict.fromkeys(key for checks in images for key in checks):
            values = [checks[key] for checks in images if checks.get(key) is not None]
            summary[method][key] = statistics.fmean(values) if values else None
    return summary


def _summary_texts(summary):
    """{method: its means as text}."""
    texts = {}
    for method, means in summary.items():
        text = f"deletion AUC {means['deletion']:.3f} (random map {means['deletion_random']:.3f}; "
        text += f"lower is better), insertion AUC {means['insertion']:.3f} (random map "
        text += f"{means['insertion_random']:.3f}; higher is better)"
        if means["randomised"] is not None:
            text += f", rank correlation with a re-initialised network {means['randomised']:+.3f}"
        if means.get("heat_in_region") is not None:
            heat, region = means["heat_in_region"], means["region"]
            text += f", {heat:.0%} of the heat in a region of {region:.0%}"
        texts[method] = text
    return texts


def _layer_text(network, explained):
    height, width = next(iter(explained.maps.values())).shape[-2:]
    size = network.preprocessing.size
    return f"layer {explained.layer}, maps of {height}×{width} for images of {size}×{size}"


def _markdown(report, layer):
    rows = [
        (f"[{row['source']}](panels/{row['panel']})", row["true"] or "", row["predicted"],
         f"{row['p_predicted']:.3f}", ", ".join(row["empty"]))
        for row in report["images"]
    ]  # fmt: skip
    paragraphs = [
        f"# What {report['network']} looks at",
        f"{', '.join(report['methods'])}; {layer}.",
        "![Contact sheet](sheet.png)",
        *(f"**{m}**: {text}." for m, text in _summary_texts(report["checks"]).items()),
        table(("image", "true", "predicted", "probability", "maps without heat"), rows),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _track(tracking, report, folder):
    columns = ["panel", "source", "true", "predicted", "p_true", "p_predicted", "target_layer"]
    rows = [
        [folder / "panels" / row["panel"], *(row[name] for name in columns[1:-1]), report["layer"]]
        for row in report["images"][:TRACKED]
    ]
    tracking.log_table("gradcam", columns, rows)
    tracking.log_image("sheet", folder / "sheet.png", 0)
    tracking.summary({"layer": report["layer"], "checks": report["checks"]})
    tracking.finish()

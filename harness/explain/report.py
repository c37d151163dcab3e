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
from tricks.cam import spatial_layers

DRAWN = 8  # classes of an image with --all_classes
ON_SHEET = 32  # images
COARSE = 4  # places a side below which a map says little
LARGE = 16  # classes an image up to which maps are kept at the image's resolution, too
TRACKED = 64  # images in the trackers' table


def plan(network, pictures, methods, machine) -> str:
    """What is about to happen, a fact a line."""
    preprocessing, note = network.preprocessing, network.run and network.run.note
    calibrated = f"temperature {network.temperature:.3f}" if network.temperature != 1 else ""
    rows = {
        "network": f"{network.name}, {preprocessing.size} px, {len(network.classes)} classes"
        + "".join(f"; {words}" for words in (network.words, calibrated, note) if words),
        "images": f"{len(pictures)}, {pictures[0].source} to {pictures[-1].source}",
        "methods": ", ".join(methods),
        "device": f"{machine['device']}, {machine['threads']} CPU threads a process; maps in fp32",
    }
    return facts(rows.items())


@dataclass(frozen=True)
class SheetOptions(TrackingOptions):
    """How the maps are drawn, and where the report is tracked. Flags' names."""

    alpha: float
    all_classes: bool


def write(options, accelerator, folder, network, pictures, found, colour, of_data_set):
    """Everything of the report into its folder, and on the trackers.

    options: SheetOptions. of_data_set: whether the pictures are of the run's own data set.
    """
    (folder / "panels").mkdir(exist_ok=True)
    for old in (folder / "panels").glob("*.png"):
        old.unlink()
    size = network.preprocessing.size
    rows = [_row(k, network, picture, found) for k, picture in enumerate(pictures)]
    strips = [
        _strip(options, network, picture, row, found, k, colour)
        for k, (picture, row) in enumerate(zip(pictures, rows, strict=True))
    ]
    for strip, row in zip(strips, rows, strict=True):
        save_sheet(folder / "panels" / row["panel"], [strip])
    layer = _layer_words(network, found)
    summary = _checks(found)
    more = f"; the first {ON_SHEET} of {len(strips)} images" if len(strips) > ON_SHEET else ""
    heading = [(f"{network.name}: {layer}{more}", "")]
    heading += [(f"{method}: {words}", "") for method, words in _summary_words(summary).items()]
    save_sheet(folder / "sheet.png", strips[:ON_SHEET], heading)
    tensors = {f"{method}/layer": maps for method, maps in found.maps.items()}
    if found.classes.shape[1] <= LARGE:
        large = {f"{method}/image": heat_of(maps, size) for method, maps in found.maps.items()}
        tensors |= large
    tensors |= {"classes": found.classes, "probabilities": found.probabilities}
    replace_file(folder / "maps.safetensors", to_bytes(tensors))
    report = {
        "network": network.name,
        "layer": found.layer,
        "map_size": list(next(iter(found.maps.values())).shape[-2:]),
        "image_size": size,
        "methods": list(found.maps),
        "checks": summary,
        "images": rows,
    }
    replace_file(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    replace_file(folder / "report.md", _markdown(escaped(report), layer).encode())
    replace_file(folder / "config.yaml", flags.to_yaml(options.recipe))
    also = _shown_in_page(network.run, folder) if of_data_set else ""
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
    for method, words in _summary_words(summary).items():
        print(f"{method:<12} {words}")
    files = "sheet.png, panels/, maps.safetensors, report.md, report.json"
    print(f"report       {folder}/{files}{also}\ntracked run  {tracking.line}")


def _finer_layer(network, picture):
    """Words about the last layer with twice as many places a side as are few; "" without one."""
    images = to_input(network, [picture], next(network.model.parameters()).device)
    finer = [
        layer.name
        for layer in spatial_layers(network.model, images)
        if min(layer.height, layer.width) >= 2 * COARSE and not layer.is_pool
    ]
    return f": --layer {finer[-1]} --method layercam shows more" if finer else ""


def _shown_in_page(run, folder):
    """Put the maps into the report.html of the run whose data set they are of; words about it."""
    if not has_file(run.folder / page.FILE):
        return ""
    file, maps = run.folder / page.FILE, folder / "sheet.png"
    lost = f"the maps are not in {file}"
    shown = add_to_folder(run, lambda: page.write_page(run.folder, run, maps), lost)
    return f"; {file} shows them" if shown else ""


def _row(k, network, picture, found):
    """What report.json says of an image."""
    probabilities = found.probabilities[k]
    predicted = int(probabilities.argmax())
    true = picture.true
    names = network.classes
    words = [names[true], names[predicted]] if true is not None else [names[predicted]]
    slugs = [file_name(word.replace(".", "_"), 40) for word in words]
    return {
        "source": picture.source,
        "true": None if true is None else names[true],
        "p_true": None if true is None else probabilities[true].item(),
        "predicted": names[predicted],
        "p_predicted": probabilities[predicted].item(),
        "targets": [names[c] for c in found.classes[k].tolist()],
        "panel": f"{k:04d}-{'-as-'.join(slugs)}.png",
        "predicted_id": predicted,
        "empty": [
            f"{method} of {names[c]}"
            for method, maps in found.maps.items()
            for c, one in zip(found.classes[k].tolist(), maps[k], strict=True)
            if not one.relu().any()
        ],
        "checks": found.checks[k],
    }


def _strip(options, network, picture, row, found, k, colour):
    """An image, its heat and overlays; with one method and one class the heat alone, too."""
    pixels = picture.pixels.permute(1, 2, 0).numpy()
    panels = [(pixels, [("image", ""), ("", "")])]
    classes = found.classes[k].tolist()
    drawn = sorted(range(len(classes)), key=lambda c: -found.probabilities[k, classes[c]])[:DRAWN]
    drawn = sorted(drawn) if not options.all_classes else drawn
    alone = len(found.maps) * len(drawn) == 1
    for method, maps in found.maps.items():
        heat = heat_of(maps[k, drawn], network.preprocessing.size).numpy()
        for c, values in zip(drawn, heat, strict=True):
            name = drawable(network.classes[classes[c]], classes[c])
            lines = [(method, ""), (name, f" ({found.probabilities[k, classes[c]]:.2f})")]
            if not values.any():
                lines[0] = (f"{method}: no heat", "")
            if alone:
                panels.append((colour(values), lines))
                lines = [("overlay", ""), ("", "")]
            panels.append((overlay(pixels, values, colour, options.alpha), lines))
    predicted = row["predicted_id"]
    title = [(picture.source, "")]
    if picture.true is not None:
        title[0] = (picture.source, ": right" if picture.true == predicted else ": wrong")
        title.append((f"true {drawable(row['true'], picture.true)}", f" ({row['p_true']:.2f})"))
    said = drawable(row["predicted"], predicted)
    title.append((f"predicted {said}", f" ({row['p_predicted']:.2f})"))
    notes = [(f"{method}: {_check_words(one)}", "") for method, one in found.checks[k].items()]
    return Strip(title, panels, notes)


def _check_words(one):
    words = f"del {one['deletion']:.2f} ({one['deletion_random']:.2f}), "
    words += f"ins {one['insertion']:.2f} ({one['insertion_random']:.2f})"
    words += "" if one["randomised"] is None else f", ρ {one['randomised']:+.2f}"
    if "heat_in_region" in one:
        words += f", in region {one['heat_in_region']:.0%} of {one['region']:.0%}"
    return words


def _checks(found):
    """Means over the images of what --check measured, by method."""
    summary = {}
    for method in found.checks[0]:
        ones = [checks[method] for checks in found.checks]
        summary[method] = {}
        for key in dict.fromkeys(key for one in ones for key in one):
            values = [one[key] for one in ones if one.get(key) is not None]
            summary[method][key] = statistics.fmean(values) if values else None
    return summary


def _summary_words(summary):
    """In full sentences, by method."""
    said = {}
    for method, one in summary.items():
        words = f"deletion AUC {one['deletion']:.3f} (random map {one['deletion_random']:.3f}; "
        words += f"lower is better), insertion AUC {one['insertion']:.3f} (random map "
        words += f"{one['insertion_random']:.3f}; higher is better)"
        if one["randomised"] is not None:
            words += f", rank correlation with a re-initialised network {one['randomised']:+.3f}"
        if one.get("heat_in_region") is not None:
            words += f", {one['heat_in_region']:.0%} of the heat in a region of {one['region']:.0%}"
        said[method] = words
    return said


def _layer_words(network, found):
    height, width = next(iter(found.maps.values())).shape[-2:]
    size = network.preprocessing.size
    return f"layer {found.layer}, maps of {height}×{width} for images of {size}×{size}"


def _markdown(report, layer):
    rows = [
        (f"[{row['source']}](panels/{row['panel']})", row["true"] or "", row["predicted"],
         f"{row['p_predicted']:.3f}", ", ".join(row["empty"]))
        for row in report["images"]
    ]  # fmt: skip
    parts = [
        f"# What {report['network']} looks at",
        f"{', '.join(report['methods'])}; {layer}.",
        "![Contact sheet](sheet.png)",
        *(f"**{m}**: {words}." for m, words in _summary_words(report["checks"]).items()),
        table(("image", "true", "predicted", "probability", "maps without heat"), rows),
    ]
    return "\n\n".join(parts) + "\n"


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

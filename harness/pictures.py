"""The PNGs of a run: its training images, tiles with captions, and its curves.

matplotlib and PIL are imported only when a picture is drawn: they cost half a second.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from itertools import groupby
from pathlib import Path

import numpy as np

from harness.files import replace_file
from harness.metrics import METRICS

GRID = (4, 8)  # rows, columns
SHOWN = 32  # images in it
TILE = 128  # px: smaller images are enlarged to at least this, by a whole factor
LARGEST = 256  # px: larger images are shrunk to this
GAP = 10  # px between tiles
FONT = 12  # px
LINE = 16  # px from one line of text to the next


def save_train_batch(path, images, targets, classes):
    """A grid of up to 32 training images with their labels; for mixed ones the two largest shares.

    A single label has no number, which would look like a predicted probability.

    images: (N, 1 or 3, H, W), uint8 or float, in 0..255 (normalisation undone), any device.
    targets: (N, K), rows that sum to 1. classes: K names in any script.
    """
    captions = []
    for row in targets[:SHOWN].detach().cpu().float().tolist():
        largest = _largest_two(row)
        captions.append(
            [
                (drawable(str(classes[index]), index), f" {weight:.0%}" if len(largest) > 1 else "")
                for index, weight in largest
            ]
        )
    save_tiles(path, images[: len(captions)], captions)


def save_tiles(path, images, captions):
    """A grid of images, each with lines of text below it.

    images: (N, 1 or 3, H, W), uint8 or float, in 0..255, any device. captions: for each image a
    list of (text, end): where the line is too long, the text is shortened, its end is not.
    """
    from PIL import Image, ImageDraw

    images = images.detach().cpu()
    if images.is_floating_point():
        images = images.float().round().clamp(0, 255).byte()
    images = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    count, height, width, _ = images.shape
    scale = math.ceil(TILE / max(height, width)) if max(height, width) < TILE else 1
    scale = min(scale, LARGEST / max(height, width))
    # Whole factors with "nearest" show the very pixels; only larger images are averaged down.
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    cell = max(size[0], TILE)

    columns = min(GRID[1], count)
    rows = math.ceil(count / columns)
    lines = max(2, *(len(caption) for caption in captions))
    step = (cell + GAP, size[1] + lines * LINE + GAP)
    canvas = Image.new("RGB", (columns * step[0] + GAP, rows * step[1] + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for n, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = GAP + n % columns * step[0], GAP + n // columns * step[1]
        tile = Image.fromarray(pixels).resize(size, method)
        canvas.paste(tile, (x + (cell - size[0]) // 2, y))
        for number, line in enumerate(caption):
            draw_line(draw, line, (x, y + size[1] + LINE * (number + 1) - 3), cell)
    save_picture(path, lambda file: canvas.save(file, "PNG"))


def _largest_two(target):
    """[(class, weight)], largest first, without the share that label smoothing spreads."""
    floor = min(target) if len(target) > 2 else 0.0  # with two classes, both may come from mixing
    largest, *runner_up = sorted(range(len(target)), key=lambda k: -target[k])[:2]
    return [
        (k, target[k]) for k in (largest, *runner_up) if k == largest or target[k] > floor + 1e-3
    ]


# Text is drawn in runs of one font each: PIL itself does not fall back to another font.


@functools.cache
def _fonts(with_system):
    """[(font, the characters it has)]: matplotlib's DejaVu Sans, then the system's."""
    from matplotlib import font_manager, ft2font, get_data_path
    from PIL import ImageFont

    files = [str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"))]
    if with_system:
        files += sorted(f.fname for f in font_manager.fontManager.ttflist if "Last" not in f.name)
    fonts = []
    for file in dict.fromkeys(files):
        try:
            font = ImageFont.truetype(file, FONT)
            fonts.append((font, frozenset(ft2font.FT2Font(file).get_charmap())))
        except (OSError, RuntimeError):
            continue  # gone since matplotlib listed it, or bitmaps of other sizes (emoji)
    return fonts


@functools.cache
def _font_of(character):
    """The first font that has the character, or None."""
    for with_system in (False, True):  # listing the system's fonts takes seconds the first time
        for font, characters in _fonts(with_system):
            if ord(character) in characters:
                return font
    return None


def font_families(text):
    """matplotlib's font families for a text, in the order in which it should try them."""
    fonts = {font for font in map(_font_of, text) if font}
    return list(dict.fromkeys(["DejaVu Sans", *sorted(font.getname()[0] for font in fonts)]))


def drawable(name, index):
    """The name, with "?" for characters that no font has, or the class's number if none is left."""
    name = " ".join(name.split())
    text = "".join(c if _font_of(c) else "?" for c in name)
    return text if any(_font_of(c) and not c.isspace() for c in name) else f"#{index}"


def _runs(text):
    return [(font, "".join(run)) for font, run in groupby(text, key=_font_of)]


def _length(text):
    return sum(font.getlength(run) for font, run in _runs(text))


def _shortened(name, room):
    if _length(name) <= room:
        return name
    while name and _length(name + "…") > room:
        name = name[:-1]
    return name.rstrip() + "…"


def draw_line(draw, line, start, room, centred=True):
    """Draw (text, end) on a baseline that starts at `start`, within `room` px.

    The text is shortened where both don't fit; its end is not.
    """
    text, end = line
    text = _shortened(text, room - _length(end)) + end
    indent = (room - _length(text)) / 2 if centred else 0
    _draw_text(draw, (start[0] + indent, start[1]), text)


def _draw_text(draw, start, text):
    """Draw with the baseline's left end at `start`."""
    x, y = start
    for font, run in _runs(text):
        draw.text((x, y), run, fill="black", font=font, anchor="ls")
        x += font.getlength(run)


# (label, colour, line style): colours of Okabe and Ito, told apart by colour-blind readers. Raw
# weights are dashed, averaged ones solid.
GREY, BLUE, VERMILION, GREEN, PINK = "#777777", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
ENDS = {"": "--", "_ema": "-"}
LEGEND = 8  # lines of a panel that its legend names, at most


def _panels(records):
    """{title of a panel: {key of the records: (colour, line style)}}, by the table of metrics.

    Metrics that no record has are left out, except for loss and accuracy.
    """
    in_training = {"acc": "mixed_acc", "loss": "loss"}
    panels = {}
    for name, metric in METRICS.items():
        scored = {f"{split}/{name}{end}" for split in ("val", "test") for end in ENDS}
        if name not in in_training and not any(scored & record.keys() for record in records):
            continue
        panel = panels.setdefault(metric.title, {})
        if name in in_training:
            panel[f"train/{in_training[name]}"] = (GREY, "-")
            panel[f"epoch/{in_training[name]}"] = (BLACK, ":")
        for split, colour in (("val", BLUE), ("test", VERMILION)):
            panel |= {f"{split}/{name}{end}": (colour, style) for end, style in ENDS.items()}
    return panels


def save_curves(path, records):
    """Loss, accuracy and learning rate over the epochs, from the objects of metrics.jsonl.

    records: dicts with "epoch" (float) and any of the keys of `_panels`, "train/lr" and
    "train/lr/<group>"; keys may be missing, values None or NaN. A vertical
    line marks where a "stage" begins.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    records = [record for record in records if record.get("epoch") is not None]
    # In the order of the record with the most of them: from the stem to the head
    rate_keys = [[k for k in record if k.split("/")[:2] == ["train", "lr"]] for record in records]
    keys = dict.fromkeys(key for group in sorted(rate_keys, key=len, reverse=True) for key in group)
    panels = _panels(records) | {"learning rate": _rate_lines(list(keys))}
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's warnings about a NaN or a zero
        figure = Figure(figsize=(8, 3 * len(panels)), dpi=110, layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True)
        for ax, (title, series) in zip(axes, panels.items(), strict=True):
            _draw_panel(ax, title, series, records)
        _mark_stages(axes, records)
        axes[-1].set_xlabel("epoch")
        save_picture(path, lambda file: figure.savefig(file, format="png"))


def _rate_lines(keys):
    """{key: (colour, line style)} of the groups' rates, no two alike.

    Dashes over a line show both of two equal rates. More groups than there are colours to tell
    apart go from dark at the input to light at the head.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colours = (GREEN, PINK, ORANGE, SKY, BLUE, VERMILION, GREY)
    if len(keys) <= len(colours):
        return {key: (colours[n], ("-", "--")[n % 2]) for n, key in enumerate(keys)}
    shades = colormaps["viridis"](np.linspace(0, 0.93, len(keys)))
    return {key: (to_hex(shade), "-") for key, shade in zip(keys, shades, strict=True)}


def _spread(keys):
    """The keys that a legend names: all, or some of many, with the first and the last."""
    places = np.linspace(0, len(keys) - 1, min(len(keys), LEGEND)).round().astype(int)
    return [keys[place] for place in places]


def _draw_panel(ax, title, series, records):
    panel_records = [r for r in records if any(r.get(key) is not None for key in series)]
    shown = _spread(list(series))
    for key, (colour, style) in series.items():
        points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None]
        if title == "learning rate":  # a group that does not train in a stage has no line there
            points = [(r["epoch"], r.get(key, math.nan)) for r in panel_records]
        finite = [value for _, value in points if math.isfinite(value)]
        if not finite:
            continue
        ax.plot(
            *zip(*points, strict=True),
            style,
            color=colour,
            linewidth=1.4,
            marker="o" if len(points) <= 30 else None,  # a single point is no line
            markersize=3,
            label=f"{key}  {finite[-1]:.4g}" if key in shown else "_",
        )
    if len(shown) < len(series):
        ax.plot([], [], " ", label=f"({len(series)} groups, from dark to light)")
    if title == "learning rate" and len(ax.lines) > 1:  # groups lie factors of ten apart
        ax.set_yscale("log")
        top = max(value for key in series for r in records if (value := r.get(key)) is not None)
        rates = [value for key in series for r in records if (value := r.get(key))]
        peaks = [max([r[key] for r in records if r.get(key)], default=top) for key in series]
        low = min(top * 1e-5, min(peaks) / 10)  # a cosine ends near 0
        ax.set_ylim(max(low, min(rates, default=0) / 2), top * 2)
    ax.set_ylabel(title)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if ax.lines:  # above the panel, where it can't hide a curve; the number is the latest value
        longest = max(len(line.get_label()) for line in ax.lines)
        columns = max(1, min(3, int(775 / (60 + 7 * longest))))  # px: of a panel, of a letter
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9)
    else:
        ax.text(0.5, 0.5, "nothing recorded", transform=ax.transAxes, ha="center", color=GREY)


def _mark_stages(axes, records):
    """A line where each stage begins: at the last record of the previous one, an epoch's end."""
    current, epoch = None, 0
    for record in records:
        if record.get("stage", current) != current:
            current = record["stage"]
            for ax in axes:
                ax.axvline(epoch, color=GREY, linestyle=":", linewidth=1)
            axes[0].text(
                epoch,
                1,
                f" {current}",
                transform=axes[0].get_xaxis_transform(),  # x in epochs, y in heights of the panel
                va="top",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
            )
        epoch = record["epoch"]


def save_picture(path, write):
    file = io.BytesIO()
    write(file)
    replace_file(path, file.getvalue())

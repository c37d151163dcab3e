"""The pictures of gradcam.py: image, heat and overlay side by side, singly and on one sheet."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from harness.errors import UserError, nearest
from harness.pictures import GAP, LARGEST, LINE, TILE, draw_line, save_picture

WIDEST = 1700  # px of a sheet: what a screen shows, and 20 cm at 216 dots an inch
FRAME = 2  # px between the panels of a strip


class Strip(NamedTuple):
    """One image's row of panels."""

    title: list  # lines of (text, end), see harness.pictures.save_tiles
    panels: list  # (uint8 (H, W, 3), lines below it)
    notes: list  # lines below all panels


def colours(name):
    """A function from heat in [0, 1] (H, W) to colours uint8 (H, W, 3), of matplotlib's maps."""
    import matplotlib

    if name not in matplotlib.colormaps:
        raise UserError(
            f'--colormap: "{name}" is not one of matplotlib\'s{nearest(name, matplotlib.colormaps)}'
        )
    table = matplotlib.colormaps[name]
    return lambda heat: (table(np.asarray(heat))[..., :3] * 255).round().astype(np.uint8)


def overlay(pixels, heat, colour, alpha):
    """The image with the heat over it, as opaque as it is hot: no heat hides nothing.

    pixels: uint8 (H, W, 3). heat: float (H, W) in [0, 1]. alpha: opacity of the hottest pixel.
    """
    share = alpha * np.asarray(heat)[..., None]
    return ((1 - share) * pixels + share * colour(heat)).round().astype(np.uint8)


def save_sheet(path, strips, heading=()):
    """Save all strips as one picture, in as many columns as fit a screen; heading: lines above."""
    sizes = [_size(strip) for strip in strips]
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    columns = max(1, min(len(strips), (WIDEST - GAP) // (width + GAP)))
    rows = math.ceil(len(strips) / columns)
    top = GAP + LINE * len(heading)
    canvas, draw = _canvas(GAP + columns * (width + GAP), top + rows * (height + GAP))
    for number, line in enumerate(heading):
        draw_line(draw, line, (GAP, LINE * (number + 1)), canvas.width - 2 * GAP, centred=False)
    for k, strip in enumerate(strips):
        at = (GAP + k % columns * (width + GAP), top + k // columns * (height + GAP))
        _draw(canvas, draw, strip, at, _tile(strip))
    save_picture(path, lambda file: canvas.save(file, "PNG", dpi=(216, 216)))


def _canvas(width, height):
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (width, height), "white")
    return canvas, ImageDraw.Draw(canvas)


def _tile(strip):
    """(width, height) in px of a panel: small images enlarged by a whole factor."""
    height, width = strip.panels[0][0].shape[:2]
    longest = max(height, width)
    scale = math.ceil(TILE / longest) if longest < TILE else min(1, LARGEST / longest)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _size(strip):
    width, height = _tile(strip)
    below = max(len(lines) for _, lines in strip.panels)
    text = LINE * (len(strip.title) + below + len(strip.notes))
    return len(strip.panels) * (width + FRAME) - FRAME, height + text


def _draw(canvas, draw, strip, at, tile):
    from PIL import Image

    x, y = at
    width, _ = _size(strip)
    for number, line in enumerate(strip.title):
        draw_line(draw, line, (x, y + LINE * (number + 1) - 4), width, centred=False)
    y += LINE * len(strip.title)
    below = max(len(lines) for _, lines in strip.panels)
    for number, (pixels, lines) in enumerate(strip.panels):
        panel_x = x + number * (tile[0] + FRAME)
        grows = tile[0] >= pixels.shape[1]
        method = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
        canvas.paste(Image.fromarray(pixels).resize(tile, method), (panel_x, y))
        for row, line in enumerate(lines):
            draw_line(draw, line, (panel_x, y + tile[1] + LINE * (row + 1) - 4), tile[0])
    y += tile[1] + LINE * below
    for number, line in enumerate(strip.notes):
        draw_line(draw, line, (x, y + LINE * (number + 1) - 4), width, centred=False)

"""Accuracy by group: `--slice_by` a column of the data set, or a property of the images."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from harness.data.pixels import encoded, image_file
from harness.errors import UserError, nearest
from harness.metrics import wilson_interval

OF_IMAGES = ("brightness", "size", "aspect")
FEW = 12  # most values of a numeric column that are groups of their own; with more, quarters
MOST = 50  # groups in a report: those with the lowest accuracy


def check_slices(names, splits, image_column):
    """Raise UserError for a name that is neither a column of all splits nor one of OF_IMAGES.

    names: of `--slice_by`, or None. splits: harness.data.sources.Split of the images to score.
    """
    for name in names or ():
        for split in splits:
            columns = [column for column in split.dataset.features if column != image_column]
            if name not in columns and name not in OF_IMAGES:
                raise UserError(
                    f"--slice_by {name}: split '{split.name}' has no column of that name"
                    f"{nearest(name, [*columns, *OF_IMAGES])} (columns {', '.join(columns)}; of "
                    f"the images {', '.join(OF_IMAGES)})"
                )


def slices(name, split, samples, image_column, right) -> list[dict]:
    """[{"group", "images", "accuracy", "interval"}], the lowest accuracy first.

    name: of `check_slices`; a column wins over a property. split and samples: the scored images as
    stored and as the network gets them. right: bool (n,), in their order.
    """
    rows = []
    right = right.numpy()
    for group, members in _groups(_values(name, split, samples, image_column)).items():
        hits, total = int(right[members].sum()), len(members)
        rows.append(
            {
                "group": group,
                "images": total,
                "accuracy": hits / total,
                "interval": wilson_interval(hits, total),
            }
        )
    return sorted(rows, key=lambda row: (row["accuracy"], -row["images"]))[:MOST]


def _values(name, split, samples, image_column):
    """The value of each sample, None where it has none, as a list."""
    if name in split.dataset.features:
        column = split.dataset.select_columns([name]).with_format("arrow")[:][name].to_pylist()
        return [column[row] for row in split.rows.tolist()]
    if name == "brightness":
        device, values = torch.device("cpu"), []
        for index in torch.arange(len(split)).split(256):
            values += samples.take(index, device)[0].float().mean((1, 2, 3)).div(255).tolist()
        return values
    sizes = _sizes(split, image_column)
    return [size and (float(min(size)) if name == "size" else size[0] / size[1]) for size in sizes]


def _sizes(split, image_column):
    """(width, height) of each image by its header; None where it can't be read."""
    from PIL import Image

    cells = encoded(split.dataset, image_column)
    for start in range(0, len(split), 100):  # the bytes of so many images at a time
        table = cells.select(split.rows[start : start + 100]).with_format("arrow")[:]
        for cell in table[image_column].to_pylist():
            try:
                with Image.open(image_file(cell)) as image:
                    yield image.size
            except Exception:
                yield None


def _groups(values):
    """{name of the group: indices of its members}; many different numbers become quarters."""
    numbers = _as_numbers(values)
    if numbers is not None and len(np.unique(numbers[~np.isnan(numbers)])) > FEW:
        edges = np.nanquantile(numbers, [0, 0.25, 0.5, 0.75, 1])
        names = [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
        quarters = np.searchsorted(edges[1:-1], numbers, "left")
        keys = [
            "none" if math.isnan(number) else names[quarter]
            for number, quarter in zip(numbers, quarters.clip(max=3), strict=True)
        ]
    else:
        keys = ["none" if value is None or value != value else str(value) for value in values]
    members = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    return {key: np.array(indices) for key, indices in members.items()}


def _as_numbers(values):
    """Floats, NaN for None, where all others are numbers or texts of numbers; else None."""
    if any(isinstance(value, bool) for value in values):
        return None
    try:
        return np.array([math.nan if value is None else float(value) for value in values])
    except (TypeError, ValueError):
        return None

"""Columns of a data set: which one holds the images, which one the labels, and what they say."""

from __future__ import annotations

import re

import numpy as np

from harness.data.tables import class_values, find_label
from harness.errors import UserError, nearest


def find_image_column(features, given):
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    return _find_column(features, given, images, "--image_column", "of images")


def find_label_column(features, given, image_column):
    """The given column; the one that is called label; the only ClassLabel, integer or string one.

    A column called label (or labels, class, target, category) wins over all others, whatever its
    type. No column of another type is taken unless it is called so or given.
    """

    others = {name: kind for name, kind in features.items() if name != image_column}
    if given:
        return _find_column(features, given, list(others), "--label_column", "of labels")
    kinds = {name: _kind_of_label(feature) for name, feature in others.items()}
    found = find_label("the data set", kinds)
    return found or _find_column(features, None, [], "--label_column", "of labels")


def _kind_of_label(feature):
    """What `find_label` wants to know of a column."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "classes"
    plain = isinstance(feature, datasets.Value) and re.fullmatch(
        r"u?int\d+|(large_)?string", feature.dtype
    )
    return "plain" if plain else "other"


def _find_column(features, given, candidates, flag, kind):
    """The given column if it is a candidate, or the only candidate."""
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    if given and given not in features:
        near = nearest(given, features)
        raise UserError(
            f"{flag} {given}: there is no such column{near} (the columns are {columns})"
        )
    if given and given not in candidates:
        raise UserError(f"{flag} {given}: the column is not {kind}; the columns are {columns}")
    if not given and len(candidates) != 1:
        count = len(candidates) or "no"
        raise UserError(
            f"there are {count} columns {kind}: name one with {flag}; the columns are {columns}"
        )
    return given or candidates[0]


def _type_name(feature):
    """What a user knows the column's type as: images, classes, int64, string."""
    kind = type(feature).__name__
    if kind == "Value":
        return feature.dtype
    return {"Image": "images", "ClassLabel": "classes"}.get(kind, kind)


def check_split(name, split, features, image_column, label_column):
    """A split has images, and the columns and classes of train."""
    if len(split) == 0:
        raise UserError(f"split '{name}' is empty")
    for column in (image_column, label_column):
        if column not in split.features:
            raise UserError(
                f"split '{name}' has no column '{column}'; its columns are "
                + ", ".join(split.features)
            )
        if _kind(split.features[column]) != _kind(features[column]):
            raise UserError(
                f"column '{column}' is {_type_name(features[column])} in train, but "
                f"{_type_name(split.features[column])} in split '{name}'"
            )
    train_names = getattr(features[label_column], "names", None)
    if getattr(split.features[label_column], "names", None) != train_names:
        raise UserError(f"the classes of split '{name}' are not those of train, or in other order")


def _kind(feature):
    """What two splits must share: Image, ClassLabel, whole numbers of any width, text."""
    name = _type_name(feature)
    return "text" if "string" in name else re.sub(r"^u?int\d+$", "whole", name)


def find_classes(train, label_column):
    """The stored values of the classes in order, and the classes' names."""
    feature = train.features[label_column]
    if hasattr(feature, "names"):
        return list(range(feature.num_classes)), list(feature.names)
    values = sorted(_values(train, label_column).unique().drop_null().to_pylist())
    return values, [str(value) for value in values]


def _values(dataset, column):
    """The labels as Arrow values: whole numbers or text; floats and booleans become these.

    Raises UserError for lists and for numbers that are not whole.
    """
    import pyarrow
    import pyarrow.compute

    stored = _arrow_column(dataset, column)
    if pyarrow.types.is_integer(stored.type):
        return stored
    if _type_name(dataset.features[column]).endswith("string"):
        empty = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(stored), "")
        return pyarrow.compute.if_else(empty, pyarrow.scalar(None, stored.type), stored)
    return pyarrow.array(class_values(f"column '{column}'", stored.to_pylist()))


def read_labels(name, role, split, label_column, values):
    """int64 (n,): the place of each row's label among `values`."""
    import pyarrow
    import pyarrow.compute

    stored, values = _values(split, label_column), pyarrow.array(values)
    without = f", or leave the split out: --{role}_split none" if role != "train" else ""
    if stored.null_count:
        rows = np.flatnonzero(pyarrow.compute.is_null(stored).to_numpy())
        raise UserError(
            f"{len(rows):,} of {len(stored):,} images of split '{name}' have no label (image "
            f"{', '.join(map(str, rows[:3]))}): give them one or take them out{without}"
        )
    if stored.type != values.type:  # int8 beside int64, string beside large_string
        stored = stored.cast(values.type)
    places = pyarrow.compute.index_in(stored, values)
    if places.null_count:
        row = pyarrow.compute.index(pyarrow.compute.is_null(places), True).as_py()
        value = stored[row].as_py()
        span = f"0 to {len(values) - 1}" if isinstance(value, int) else "those of train"
        raise UserError(
            f"image {row} of split '{name}' has the label {value!r}, but the classes are {span}: "
            f"correct it{without}"
        )
    return places.to_numpy().astype(np.int64)


def _arrow_column(dataset, column):
    """A column as Arrow values, without a Python object per row."""
    return dataset.select_columns(column).with_format("arrow")[:][column]

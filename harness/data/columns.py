"""Columns of a data set: which one holds the images, which one the labels, and which classes."""

from __future__ import annotations

import re

import numpy as np

from harness.data.tables import class_values, find_label
from harness.errors import UserError, nearest


def find_image_column(features, column):
    """`column` where it is given, else the only column of images."""
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    return _find_column(features, column, images, "--image_column", "images")


def find_label_column(features, column, image_column):
    """`column` where it is given, else the only column that can hold the labels.

    A column called label (or labels, class, target, category) goes before all others, whatever its
    type. Without one, columns of ClassLabel go before columns of integers or strings. A column of
    another type is never taken for its type alone.
    """

    candidates = {name: feature for name, feature in features.items() if name != image_column}
    if column:
        return _find_column(features, column, list(candidates), "--label_column", "labels")
    kinds = {name: _kind_of_label(feature) for name, feature in candidates.items()}
    label_column = find_label("the data set", kinds)
    return label_column or _find_column(features, None, [], "--label_column", "labels")


def _kind_of_label(feature):
    """The kind of a column, as `find_label` needs it."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "classes"
    plain = isinstance(feature, datasets.Value) and re.fullmatch(
        r"u?int\d+|(large_)?string", feature.dtype
    )
    return "plain" if plain else "other"


def _find_column(features, column, candidates, flag, content):
    """`column` if it is one of the candidates, or the only candidate if no column is given."""
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    if column and column not in features:
        near = nearest(column, features)
        raise UserError(
            f"{flag} {column}: there is no such column{near} (the columns are {columns})"
        )
    if column and column not in candidates:
        raise UserError(
            f"{flag} {column}: the column does not hold {content}; the columns are {columns}"
        )
    if not column and len(candidates) != 1:
        count = len(candidates) or "no"
        raise UserError(
            f"there are {count} columns of {content}: name one with {flag}; the columns are "
            f"{columns}"
        )
    return column or candidates[0]


def _type_name(feature):
    """A column's type in the words of users: images, classes, int64, string."""
    kind = type(feature).__name__
    if kind == "Value":
        return feature.dtype
    return {"Image": "images", "ClassLabel": "classes"}.get(kind, kind)


def check_split(name, split, features, image_column, label_column):
    """Raise UserError unless a split has images, and the columns and classes of train."""
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
        raise UserError(
            f"the classes of split '{name}' are not those of train, or are in another order"
        )


def _kind(feature):
    """The kind of a column, which must be the same in all splits; integers of any width are one."""
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
    """The labels as Arrow values: whole numbers or text, which floats and booleans become too.

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
    """int64 (n,): the index in `values` of each row's label."""
    import pyarrow
    import pyarrow.compute

    stored, values = _values(split, label_column), pyarrow.array(values)
    alternative = f", or leave the split out: --{role}_split none" if role != "train" else ""
    if stored.null_count:
        rows = np.flatnonzero(pyarrow.compute.is_null(stored).to_numpy())
        raise UserError(
            f"{len(rows):,} of {len(stored):,} images of split '{name}' have no label (image "
            f"{', '.join(map(str, rows[:3]))}): give them one or take them out{alternative}"
        )
    if stored.type != values.type:  # int8 beside int64, string beside large_string
        stored = stored.cast(values.type)
    indices = pyarrow.compute.index_in(stored, values)
    if indices.null_count:
        row = pyarrow.compute.index(pyarrow.compute.is_null(indices), True).as_py()
        value = stored[row].as_py()
        span = f"0 to {len(values) - 1}" if isinstance(value, int) else "those of train"
        raise UserError(
            f"image {row} of split '{name}' has the label {value!r}, but the classes are {span}: "
            f"correct it{alternative}"
        )
    return indices.to_numpy().astype(np.int64)


def _arrow_column(dataset, column):
    """A column as Arrow values, without a Python object per row."""
    return dataset.select_columns(column).with_format("arrow")[:][column]

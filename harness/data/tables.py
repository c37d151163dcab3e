"""Tables of labels beside images: metadata.csv, train.csv, or what --labels names.

A table has a column of files and a column of labels. Rows and files are matched by the file's path
relative to the table, to the folder of its split or to any folder below, with or without suffix.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data.folders import (
    TABLE_SUFFIXES,
    Images,
    Listing,
    class_key,
    count_left_out,
    counted,
    few,
    split_of,
    splits_of,
    tops,
)
from harness.errors import UserError, nearest
from harness.files import is_lfs_pointer

FILE_COLUMNS = ("file_name", "filename", "file", "image", "path", "id", "image_id", "image_name")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")
WHOLE = re.compile(r"-?(0|[1-9]\d*)([.]0+)?")


@dataclass
class Table:
    """The rows of one table: what is the file, what is its label."""

    name: str  # for messages
    files: list[str | None]
    labels: list | None  # None where it has no column of labels; None for an empty cell
    label_column: str | None
    file_column: str
    others: dict[str, list]  # further columns


def read_table(path, file_column=None, label_column=None) -> Table:
    """Read .csv, .tsv, .jsonl or .parquet; ids stay text. Raises UserError that names the table."""
    path = Path(path)
    columns = _read_columns(path)
    if not columns or not len(next(iter(columns.values()))):
        raise UserError(f"{path} has no rows")
    file = _pick(path, columns, file_column, "--file_column", FILE_COLUMNS)
    if file is None:
        raise UserError(
            f"{path} has no column of file names ({', '.join(FILE_COLUMNS[:6])}): name it with "
            f"--file_column; its columns are {', '.join(columns)}"
        )
    others = {name: values for name, values in columns.items() if name != file}
    kinds = {name: _kind(values) for name, values in others.items()}
    label = find_label(path, kinds, label_column)
    labels = None
    if label is not None:
        labels = class_values(f"column '{label}' of {path}", others.pop(label))
    files = [None if value is None else str(value).strip() for value in columns[file]]
    return Table(str(path), files, labels, label, file, others)


def _read_columns(path) -> dict[str, list]:
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise UserError(f"{path}: tables are read from {', '.join(TABLE_SUFFIXES)}")
    try:
        if is_lfs_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer, not the file: git lfs pull")
        if suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pydict()
        with open(path, encoding=_encoding(path), newline="") as file:
            return _read_json_lines(path, file) if suffix == ".jsonl" else _read_csv(path, file)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such table") from None
    except UnicodeError:
        raise UserError(f"{path} is not in UTF-8: save it as UTF-8") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a table: {str(error).splitlines()[0]}") from None


def _encoding(path):
    """UTF-8, or UTF-16 where the file begins as spreadsheets write that."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _read_csv(path, file):
    """Cells between commas, semicolons or tabs, whichever the first line has most of."""
    start = file.readline()
    file.seek(0)
    reader = csv.reader(file, delimiter=max(",;\t", key=start.count))
    head, rows = None, []
    for row in reader:
        if not any(row):
            continue
        if head is None:
            head = [name.strip() for name in row]
        elif len(row) != len(head):
            raise UserError(
                f"{path}, line {reader.line_num}: {len(row)} cells under {len(head)} columns"
            )
        else:
            rows.append(row)
    twice = [name for name, number in Counter(head or ()).items() if number > 1 and name]
    if twice:
        raise UserError(f"{path} has two columns called {twice[0]}")
    return {
        name: [row[k].strip() or None for row in rows]
        for k, name in enumerate(head or ())
        if name  # the number of the row, as pandas writes it
    }


def _read_json_lines(path, file):
    rows = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _pick(path, columns, given, flag, known):
    """The column that is given, or the first of the known names that is there."""
    if given:
        if given not in columns:
            raise UserError(
                f"{flag} {given}: {path} has no such column{nearest(given, columns)} "
                f"(its columns are {', '.join(columns)})"
            )
        return given
    lower = {name.lower(): name for name in columns}
    return next((lower[name] for name in known if name in lower), None)


def find_label(source, kinds, given=None) -> str | None:
    """The column of labels: the given one, the one that is called so, or the only one there can be.

    kinds: {name: "classes", "plain" (whole numbers or text) or "other"} of all columns but those
    of images and files. None where there is none. Raises UserError where it can't be told which.
    """
    if given:
        return _pick(source, kinds, given, "--label_column", ())
    called = [name for name in kinds if name.lower() in LABEL_COLUMNS]
    classes = [name for name, kind in kinds.items() if kind == "classes"]
    plain = [name for name, kind in kinds.items() if kind == "plain"]
    if len(found := called or classes or plain) > 1:
        why = "" if called else " and none called label"
        raise UserError(
            f"{source} has the columns {', '.join(found)}{why}: name one with --label_column"
        )
    return found[0] if found else None


def _kind(values):
    """What `find_label` wants to know of a table's column."""
    present = [value for value in values if value is not None]
    if not present or any(isinstance(value, bool) for value in present):
        return "other"
    try:
        class_values("", present)
    except UserError:
        return "other"
    return "plain"


def class_values(where, values) -> list:
    """Labels as whole numbers where all are, else as text; None stays, NaN becomes None.

    Raises UserError for lists, and for numbers that are not whole, naming `where`.
    """
    values = [None if value != value else value for value in values]
    present = [value for value in values if value is not None]
    odd = next((v for v in present if isinstance(v, (list, tuple, dict, np.ndarray))), None)
    if odd is not None:
        raise UserError(f"{where} holds {odd!r}: several labels an image are not supported")
    if all(isinstance(v, bool) for v in present):
        return [None if v is None else str(v).lower() for v in values]
    texts = [None if v is None else str(v).strip() for v in values]
    whole = [text is None or bool(WHOLE.fullmatch(text)) for text in texts]
    if all(whole):
        return [None if text is None else int(text.partition(".")[0]) for text in texts]
    fractions = [not w and _is_number(text) for w, text in zip(whole, texts, strict=True)]
    if all(w or f for w, f in zip(whole, fractions, strict=True)):
        raise UserError(
            f"{where} holds {texts[fractions.index(True)]}: classes are whole numbers or names"
        )
    return [None if text is None else class_key(text) for text in texts]


def _is_number(text):
    try:
        return float(text) == float(text)
    except ValueError:
        return False


# -- with the images -----------------------------------------------------------------------------


def find_tables(root, tree) -> dict[str, str]:
    """{split or "": path} of the tables that say by their names what they are.

    metadata.* in a split's folder or at the root, labels.*, and train.*, val.*, test.* at the root
    (not .parquet, which is rather the data set itself). Raises UserError for two of one kind.
    """
    found: dict[str, str] = {}

    def note(split, folder, name):
        path = str(Path(root) / folder.path / name)
        if split in found or (found and "" in (split, *found)):
            raise UserError(
                f"{root} has the tables {', '.join([*found.values(), path])}: name the right one "
                "with --labels FILE, or with --layout that the folders say the classes"
            )
        found[split] = path

    for top in tops(tree):
        for name in top.tables:
            stem, suffix = os.path.splitext(name.lower())
            if stem in ("metadata", "labels"):
                note("", top, name)
            elif suffix != ".parquet" and stem in _SPLIT_TABLES:
                note(split_of(stem), top, name)
    if not found:
        for folder in (folder for top in tops(tree) for folder in top.with_images()):
            for name in folder.tables:
                if split_of(folder.name) and name.lower().startswith("metadata."):
                    note(split_of(folder.name), folder, name)
    return found


_SPLIT_TABLES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def read_tables(root, tree, tables, file_column=None, label_column=None) -> Listing:
    """The splits and labels that tables give to the images of a tree.

    tables: {split or "": path}; "" is for all splits. Raises UserError where over half of the rows
    have no file, one file has two labels, or no image of train has a label.
    """
    listing, folders = Listing({}), splits_of(tree)
    all_images = Images.of(tree)
    said, with_label = [], set()
    for split, path in tables.items():
        table = read_table(path, file_column, label_column)
        folder = folders.get(split, tree)
        images = Images.of(folder) if folder is not tree else all_images
        places = _match(table, images, root, folder.path)
        said.append(f"{Path(path).name} ({table.file_column} → {table.label_column or 'no label'})")
        if table.labels is None:
            rows = sorted({place for place in places if place is not None})
            paths = [images.paths[row] for row in rows]
            listing.reported += paths
            listing.unlabelled.update(path.rpartition("/")[0] for path in paths)
            continue
        images.labels = _labels_of(table, images, places)
        images.others = {
            name: _of_images(values, places, len(images)) for name, values in table.others.items()
        }
        _tell_rows(listing, table, images, places)
        known = np.array([label is not None for label in images.labels])
        with_label.update(images.paths[row] for row in np.flatnonzero(known))
        parts = {split: known} if split else {
            name: known & _inside(images, part) for name, part in folders.items()
        }  # fmt: skip
        for name, rows in parts.items():
            if rows.any():
                listing.splits[name] = images.where(rows)
    if "train" not in listing.splits:
        raise UserError(
            f"{', '.join(tables.values())} gives no label to any image of train in {root}"
        )
    listing.notes.append("labels from " + ", ".join(said))
    _tell_images(listing, all_images, with_label, [f for f in folders.values() if f is not tree])
    count_left_out(listing, tree, root, tables.values())
    return listing


def _inside(images, folder):
    """bool (n,): which of the images are below the folder."""
    start = f"{folder.path}/".lstrip("/")
    return np.array([path.startswith(start) for path in images.paths])


def _match(table, images, root, folder) -> list[int | None]:
    """The image of each row of a table.

    folder: of the table's split, relative to the root.
    """
    root = Path(root).resolve()
    beside = os.path.relpath(Path(table.name).resolve().parent, root)
    starts = [f"{start}/" if start not in ("", ".") else "" for start in (beside, folder, "")]
    exact = {path: k for k, path in enumerate(images.paths)}
    loose: dict[str, list[int]] = {}  # by the file's name and the path, with and without suffix
    for k, path in enumerate(images.paths):
        stem = re.sub(r"[.][^./]*$", "", path)
        for end in {path.rpartition("/")[2], stem.rpartition("/")[2], path, stem}:
            loose.setdefault(end, []).append(k)
    ends: dict[str, list[int]] = {}
    places, missing = [], []
    for file in table.files:
        name = (file or "").replace("\\", "/")
        place = None
        if re.match("/|[A-Za-z]:/", name):
            place = _absolute(name, root, exact)
        elif name:
            tried = [start + name for start in starts]
            if beside.startswith("..") or "./" in name or "//" in name:
                tried = [os.path.relpath(os.path.join(root, path), root) for path in tried]
            place = next((exact[path] for path in tried if path in exact), None)
            if place is None:
                found = next((loose[path] for path in tried if path in loose), [])
                if not found and "/" in name:
                    ends = ends or _ends(images.paths)
                    found = ends.get(name, [])
                if len(found) > 1:
                    raise UserError(
                        f"{table.name}: {file} may be {few([images.paths[k] for k in found])}: "
                        "write the path as well"
                    )
                place = found[0] if found else None
        places.append(place)
        if place is None:
            missing.append(file or "an empty cell")
    if len(missing) * 2 > len(places):
        raise UserError(
            f"{table.name}: {len(missing):,} of {len(places):,} rows have no image ({few(missing)} "
            f"in column '{table.file_column}'): is it the table of these images?"
        )
    return places


def _absolute(name, root, exact) -> int | None:
    """The image at an absolute path, which may have been written on another machine.

    Its whole path below the root, or the root's name and that, must be the end of `name`.
    """
    inside = name.removeprefix(f"{root}/")
    parts = name.split("/")
    tails = ("/".join(parts[n:]) for n in range(1, len(parts) - 1))
    return next(
        (
            exact[path]
            for tail in (inside, *tails)
            for path in (tail, tail.removeprefix(f"{root.name}/"))
            if path in exact
        ),
        None,
    )


def _ends(paths):
    """Every end of every path that begins after a slash -> the images that have it."""
    found: dict[str, list[int]] = {}
    for k, path in enumerate(paths):
        parts = path.split("/")
        for n in range(1, len(parts)):
            found.setdefault("/".join(parts[n:]), []).append(k)
    return found


def _labels_of(table, images, places):
    """The label of each image, None where a table has none."""
    labels: list = [None] * len(images)
    for place, label in zip(places, table.labels, strict=True):
        if place is None or label is None:
            continue
        if labels[place] is not None and labels[place] != label:
            raise UserError(
                f"{table.name} has {images.paths[place]} twice, with the labels "
                f"{labels[place]!r} and {label!r}"
            )
        labels[place] = label
    return labels


def _of_images(values, places, number):
    """The values of a column for each image, None without a row."""
    found: list = [None] * number
    for place, value in zip(places, values, strict=True):
        if place is not None:
            found[place] = value
    return found


def _tell_rows(listing, table, images, places):
    """Say what of a table was not used."""
    missing = [file for file, place in zip(table.files, places, strict=True) if place is None]
    name = Path(table.name).name
    if missing:
        listing.left_out.append(
            f"{counted(len(missing), 'row')} of {name} without an image: {few(map(str, missing))}"
        )
    empty = [
        images.paths[place]
        for place, label in zip(places, table.labels, strict=True)
        if place is not None and label is None and images.labels[place] is None
    ]
    if empty:
        listing.reported += empty
        listing.left_out.append(
            f"{counted(len(empty), 'image')} without a label in {name}: {few(empty)}"
        )


def _tell_images(listing, images, with_label, folders):
    """Say which images have no row; those of a whole split are unlabelled."""
    reported = set(listing.reported)
    without = [p for p in images.paths if p not in with_label and p not in reported]
    for folder in folders:
        start = f"{folder.path}/"
        inside = [path for path in without if path.startswith(start)]
        if len(inside) == folder.total:
            listing.leave_unlabelled(folder)
            without = [path for path in without if not path.startswith(start)]
    if without:
        listing.reported += without
        listing.left_out.append(f"{counted(len(without), 'image')} without a row: {few(without)}")

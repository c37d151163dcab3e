"""Tables of labels beside images: metadata.csv, train.csv, or what --labels names.

A table has a column of files and a column of labels. Rows and files are matched by the file's path
relative to the table, to the folder of its split or to any folder below, with or without suffix.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data.folders import Images, Listing, account, counted, few, split_of, splits_of
from harness.errors import UserError, nearest
from harness.files import is_lfs_pointer

FILE_COLUMNS = ("file_name", "filename", "file", "image", "path", "id", "image_id", "image_name")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass
class Table:
    """The rows of one table: what is the file, what is its label."""

    name: str  # for messages
    files: list[str]
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
    label = find_label(path, others, label_column)
    labels = None
    if label is not None:
        labels = class_values(f"column '{label}' of {path}", columns[label])
    files = [None if value is None else str(value).strip() for value in columns[file]]
    others.pop(label, None)
    return Table(str(path), files, labels, label, file, others)


def _read_columns(path) -> dict[str, list]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: tables are read from {', '.join(SUFFIXES)}")
    try:
        if is_lfs_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer, not the file: git lfs pull")
        if suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pydict()
        if suffix == ".jsonl":
            return _read_lines(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            start = file.readline()
            file.seek(0)
            marks = {mark: start.count(mark) for mark in ",;\t"}
            mark = max(marks, key=marks.get) if any(marks.values()) else ","
            head, *rows = [row for row in csv.reader(file, delimiter=mark) if any(row)] or [[]]
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such table") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a table: {str(error).splitlines()[0]}") from None
    head = [name.strip() for name in head]
    for number, row in enumerate(rows, 2):
        if len(row) != len(head):
            raise UserError(f"{path}, line {number}: {len(row)} cells under {len(head)} columns")
    return {name: [row[k].strip() or None for row in rows] for k, name in enumerate(head)}


def _read_lines(path):
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
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


def find_label(source, columns, given=None) -> str | None:
    """The column of labels: the given one, the one that is called so, or the only other one.

    columns: {name: anything}, without those of images and files. None where there are none.
    Raises UserError where it can't be told which.
    """
    if given:
        return _pick(source, columns, given, "--label_column", ())
    called = [name for name in columns if name.lower() in LABEL_COLUMNS]
    if len(called) > 1:
        raise UserError(
            f"{source} has the columns {', '.join(called)}: name one with --label_column"
        )
    if called:
        return called[0]
    if len(columns) > 1:
        raise UserError(
            f"{source} has no column called label, and {len(columns)} others "
            f"({', '.join(columns)}): name one with --label_column"
        )
    return next(iter(columns), None)


def class_values(where, values) -> list:
    """Labels as whole numbers where all are, else as text; None stays.

    Raises UserError for lists, and for numbers that are not whole, naming `where`.
    """
    present = [value for value in values if value is not None and value == value]
    odd = next((v for v in present if isinstance(v, (list, tuple, dict, np.ndarray))), None)
    if odd is not None:
        raise UserError(f"{where} holds {odd!r}: several labels an image are not supported")
    whole = re.compile(r"-?(0|[1-9]\d*)([.]0+)?")
    if all(isinstance(v, bool) for v in present):
        return [None if v is None else str(v).lower() for v in values]
    texts = [_number_text(v) for v in present]
    if all(whole.fullmatch(text) for text in texts):
        return [int(float(v)) if v is not None and v == v else None for v in values]
    fraction = next((t for t in texts if _is_fraction(t)), None)
    if fraction is not None and all(_is_fraction(t) or whole.fullmatch(t) for t in texts):
        raise UserError(f"{where} holds {fraction}: classes are whole numbers or names")
    return [None if v is None or v != v else str(v).strip() for v in values]


def _number_text(value):
    return str(value).strip()


def _is_fraction(text):
    try:
        return float(text) != int(float(text))
    except (ValueError, OverflowError):
        return False


# -- with the images -----------------------------------------------------------------------------


def find_tables(root, tree) -> dict[str, str]:
    """{split or "": path} of the tables that say of themselves what they are.

    metadata.* in a split's folder or at the root, labels.csv, and train.csv, val.csv, test.csv at
    the root.
    """
    root, found = Path(root), {}
    tops = [tree, *tree.inhabited()[: len(tree.inhabited()) == 1]]
    for top in tops:
        for name in ("metadata", "labels"):
            for suffix in SUFFIXES:
                if (file := root / top.path / f"{name}{suffix}").is_file():
                    found.setdefault("", str(file))
        for file in sorted((root / top.path).glob("*.*")):
            if file.suffix.lower() in SUFFIXES[:3] and file.stem.lower() in _SPLIT_TABLES:
                found.setdefault(split_of(file.stem), str(file))
    if "" in found and len(found) > 1:
        several = ", ".join(Path(path).name for path in found.values())
        raise UserError(f"{root} has the tables {several}: name the right one with --labels FILE")
    if found:
        return found
    for folder in (folder for top in tops for folder in top.inhabited()):
        split = split_of(folder.name)
        for suffix in SUFFIXES if split else ():
            file = root / folder.path / f"metadata{suffix}"
            if file.is_file():
                if split in found:
                    raise UserError(f"{found[split]} and {file} are both of the split '{split}'")
                found[split] = str(file)
    return found


_SPLIT_TABLES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def read_tables(root, tree, tables, file_column=None, label_column=None) -> Listing:
    """The splits and labels that tables give to the images of a tree.

    tables: {split or "": path}; "" is for all splits. Raises UserError where over half of the rows
    have no file, one file has two labels, or no image of train has a label.
    """
    listing, folders = Listing({}), splits_of(tree)
    all_images = Images.of(tree)
    rows_left = {}
    for split, path in tables.items():
        table = read_table(path, file_column, label_column)
        below = Path(path).parent
        base = "" if below == Path(root) else _relative(below, root)
        folder = folders.get(split) if split else None
        images = Images.of(folder) if folder and folder is not tree else all_images
        places = _match(table, images, base, folder.path if folder else "")
        rows_left[split] = table, images, places
    for split, (table, images, places) in rows_left.items():
        labels = _labels_of(table, images, places)
        known = np.array([label is not None for label in labels])
        matched = np.zeros(len(images), bool)
        matched[[k for k in places if k is not None]] = True
        if table.labels is None:
            listing.unlabelled[_folder_of(images, matched)] = int(matched.sum())
            listing.strays += [images.paths[k] for k in np.flatnonzero(matched)]
            continue
        others = {
            name: _of_images(values, places, len(images)) for name, values in table.others.items()
        }
        images = Images(images.paths, images.facts, labels, others)
        _tell_rows(listing, table, images, places)
        if split:
            listing.splits[split] = images.where(known)
        else:
            of_split = _split_of_each(images, folders, tree)
            for name in folders:
                keep = known & (of_split == name)
                if keep.any():
                    listing.splits[name] = images.where(keep)
    if "train" not in listing.splits or not len(listing.splits["train"]):
        names = ", ".join(tables.values())
        raise UserError(f"{names} gives no label to any image of train in {root}")
    listing.notes.append(
        "labels from " + ", ".join(
            f"{Path(t.name).name} ({t.file_column} → {t.label_column or 'no labels'})"
            for t, _, _ in rows_left.values()
        )
    )  # fmt: skip
    taken = {path for images in listing.splits.values() for path in images.paths}
    counted_already = taken | set(listing.strays)
    without = [path for path in all_images.paths if path not in counted_already]
    test_folders = {
        folder.path: folder.total
        for folder in folders.values()
        if folder is not tree and not any(p.startswith(f"{folder.path}/") for p in counted_already)
    }
    for path, number in test_folders.items():
        listing.unlabelled[path] = number
    without = [p for p in without if not any(p.startswith(f"{f}/") for f in test_folders)]
    if without:
        listing.strays += without
        listing.left_out.append(f"{counted(len(without), 'image')} without a row: {few(without)}")
    account(listing, tree, root)
    return listing


def _relative(path, root):
    try:
        return Path(path).resolve().relative_to(Path(root).resolve()).as_posix().removeprefix(".")
    except ValueError:
        return ""


def _folder_of(images, matched):
    paths = {images.paths[k].rpartition("/")[0] for k in np.flatnonzero(matched)}
    return min(paths, default="")


def _match(table, images, base, folder) -> list[int | None]:
    """The image of each row of a table."""
    exact = {path: k for k, path in enumerate(images.paths)}
    loose: dict[str, list[int]] = {}  # by the end of the path, with and without suffix
    for k, path in enumerate(images.paths):
        stem = re.sub(r"[.][^./]*$", "", path)
        for end in {path.rpartition("/")[2], stem.rpartition("/")[2], path, stem}:
            loose.setdefault(end, []).append(k)
    ends = {}
    places, missing = [], []
    for file in table.files:
        name = (file or "").replace("\\", "/").removeprefix("./")
        tried = [f"{start}/{name}" if start else name for start in (base, folder, "")]
        place = next((exact[t] for t in tried if t in exact), None)
        if place is None and name:
            found = next((loose[t] for t in (*tried, name) if t in loose), [])
            if not found and "/" in name:
                ends = ends or _ends(images.paths)
                found = ends.get(name, [])
            if len(set(found)) > 1:
                raise UserError(
                    f"{table.name}: {file} may be {few([images.paths[k] for k in found])}: write "
                    "the path as well"
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
    if table.labels is None:
        return labels
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
        listing.strays += empty
        listing.left_out.append(
            f"{counted(len(empty), 'image')} without a label in {name}: {few(empty)}"
        )


def _split_of_each(images, folders, tree):
    of = np.full(len(images), "train" if folders.get("train") is tree else "", dtype=object)
    for name, folder in folders.items():
        if folder is not tree:
            start = f"{folder.path}/"
            of[[path.startswith(start) for path in images.paths]] = name
    return of

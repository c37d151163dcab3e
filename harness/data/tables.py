"""Tables of labels: reading them, and finding the columns of files, labels and splits."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from os.path import splitext

import numpy as np

from harness.data.folders import SPLIT_WORDS, split_of
from harness.data.formats import image_suffixes
from harness.data.listing import TABLE_SUFFIXES, class_key
from harness.errors import UserError, nearest
from harness.files import is_lfs_pointer

FILE_COLUMNS = (
    "file_name", "filename", "file", "path", "file_path", "filepath", "image_path", "image",
    "image_name", "image_id", "id",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")
WHOLE = re.compile(r"-?(0|[1-9]\d*)([.]0+)?")
YES_OR_NO = {
    **dict.fromkeys(("1", "1.0", "true", "t", "yes", "y"), True),
    **dict.fromkeys(("0", "0.0", "false", "f", "no", "n"), False),
}
IS_SPLIT = re.compile(r"is_?(train|valid|val|test)(ing|ation)?(_?(img|image))?")


def read_columns(path) -> dict[str, list]:
    """The columns of a .csv, .tsv, .jsonl or .parquet file.

    Cells of .csv and .tsv are text, None where empty. Raises UserError that names the table.
    """
    columns = _read(path)
    if not columns or not len(next(iter(columns.values()))):
        raise UserError(f"{path} has no rows")
    return columns


def _read(path):
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
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such table") from None
    except UnicodeError:
        raise UserError(f"{path} is not in UTF-8: save it as UTF-8") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a table: {str(error).splitlines()[0]}") from None


def _encoding(path):
    """UTF-8, or UTF-16 where the file begins with the mark by which spreadsheets write it."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _read_csv(path, file):
    """Columns of a .csv: what the first line has most of (comma, semicolon, tab, bar) separates."""
    start = file.readline()
    if re.fullmatch(r'"?sep=.\s*"?\s*', start):  # a line for Excel
        start = file.readline()
    reader = csv.reader(
        itertools.chain([start], file), delimiter=max(",;\t|", key=start.count),
        skipinitialspace=True,
    )  # fmt: skip
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
    image = next(
        (name for name in head or () if splitext(name)[1].lower() in image_suffixes()), None
    )
    if image:
        raise UserError(f"{path} has no line of column names: it begins with {image}")
    twice = [name for name, number in Counter(head or ()).items() if number > 1 and name]
    if twice:
        raise UserError(f"{path} has two columns called {twice[0]}")
    return {
        name: [row[k].strip() or None for row in rows]
        for k, name in enumerate(head or ())
        if name  # without one: the numbers of rows, as pandas writes them
    }


def _read_json_lines(path, file):
    rows = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def check_column(path, columns, column, flag):
    """Return `column`, the value of `flag`; UserError where the table has no such column."""
    if column not in columns:
        raise UserError(
            f"{flag} {column}: {path} has no such column{nearest(column, columns)} "
            f"(its columns are {', '.join(columns)})"
        )
    return column


def file_columns(columns) -> list[str]:
    """The columns that have the name of a column of files."""
    lower = {name.lower(): name for name in columns}
    return [lower[name] for name in FILE_COLUMNS if name in lower]


def find_label(source, kinds, column=None) -> str | None:
    """The column of labels: `column`, or the one called label, or the only candidate.

    kinds: {name: "classes", "plain" (whole numbers or text) or "other"} of all columns but those
    of images and files. None without a candidate. Raises UserError for several.
    """
    if column:
        return check_column(source, kinds, column, "--label_column")
    called = [name for name in kinds if name.lower() in LABEL_COLUMNS]
    if len(candidates := label_candidates(kinds)) > 1:
        remark = "" if called else " and none called label"
        raise UserError(
            f"{source} has the columns {', '.join(candidates)}{remark}: name one with "
            "--label_column"
        )
    return candidates[0] if candidates else None


def label_candidates(kinds) -> list[str]:
    """The columns that may hold the labels, see `find_label`."""
    called = [name for name in kinds if name.lower() in LABEL_COLUMNS]
    classes = [name for name, kind in kinds.items() if kind == "classes"]
    return called or classes or [name for name, kind in kinds.items() if kind == "plain"]


def kind_of(values) -> str:
    """The kind of a table's column, as `find_label` needs it."""
    present = [value for value in values if value is not None]
    if not present or any(isinstance(value, bool) for value in present):
        return "other"
    try:
        class_values("", present)
    except UserError:
        return "other"
    return "plain"


def class_values(source, values) -> list:
    """Labels as whole numbers if all are whole numbers, else as text; NaN and empty text are None.

    Raises UserError for lists, and for numbers that are not whole. source: names the column in it.
    """
    values = [None if v != v or (isinstance(v, str) and not v.strip()) else v for v in values]
    present = [value for value in values if value is not None]
    odd = next((v for v in present if isinstance(v, (list, tuple, dict, np.ndarray))), None)
    if odd is not None:
        raise UserError(f"{source} holds {odd!r}: several labels an image are not supported")
    if any(isinstance(v, bytes) for v in present):
        raise UserError(f"{source} holds bytes: classes are whole numbers or names")
    if all(isinstance(v, bool) for v in present):
        return [None if v is None else str(v).lower() for v in values]
    texts = [None if v is None else str(v).strip() for v in values]
    integers = [text is None or bool(WHOLE.fullmatch(text)) for text in texts]
    if all(integers):
        return [None if text is None else int(text.partition(".")[0]) for text in texts]
    fractions = [not i and _is_fraction(text) for i, text in zip(integers, texts, strict=True)]
    if any(fractions) and all(i or f for i, f in zip(integers, fractions, strict=True)):
        raise UserError(
            f"{source} holds {texts[fractions.index(True)]}: classes are whole numbers or names"
        )
    return [None if text is None else class_key(text) for text in texts]


def _is_fraction(text):
    try:
        return not float(text).is_integer()
    except (ValueError, OverflowError):
        return False


def split_column(path, columns, label_column=None) -> tuple[str, list] | None:
    """The name of the column that says the split of each row, and the splits; None without one.

    It is a column in which every cell is the name of a split; one called split (subset, usage,
    partition), where rows with other words are of no split (None); or is_train, is_valid or is_test
    with yes and no. Raises UserError for two that differ, and for cells that are not yes or no.
    """
    candidates = {}
    for name, values in columns.items():
        if name.lower() in LABEL_COLUMNS or name == label_column:
            continue
        texts = ["" if value is None else str(value).strip() for value in values]
        if match := IS_SPLIT.fullmatch(name.lower()):
            odd = next((text for text in texts if text.lower() not in YES_OR_NO), None)
            if odd is not None:
                raise UserError(f"column '{name}' of {path} says {odd!r}, neither yes nor no")
            yes = SPLIT_WORDS[match[1]]
            no = "test" if yes == "train" else "train"
            candidates[name] = [yes if YES_OR_NO[text.lower()] else no for text in texts]
        elif {text.lower() for text in texts} <= set(SPLIT_WORDS):
            candidates[name] = [SPLIT_WORDS[text.lower()] for text in texts]
        elif name.lower() in ("split", "subset", "usage", "partition"):
            splits = [split_of(text) for text in texts]
            if "train" in splits:
                candidates[name] = splits
    column = next(iter(candidates.items()), None)
    differing = [name for name, splits in candidates.items() if splits != column[1]]
    if differing:
        raise UserError(
            f"{path} says the split in the columns {column[0]} and {differing[0]}, which differ: "
            "leave only one of them"
        )
    return column

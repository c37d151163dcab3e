"""Labels that tables give to the images of a folder: metadata.csv, train.csv, --labels FILE.

Rows and files are matched by the file's path relative to the table, to the folder of its split or
to any folder below, with or without suffix.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.data.folders import labelled_splits, split_images, split_of, tops
from harness.data.formats import image_suffixes
from harness.data.listing import Images, Listing, class_key, counted, few
from harness.data.tables import (
    FILE_COLUMNS,
    LABEL_COLUMNS,
    class_values,
    file_columns,
    find_label,
    kind_of,
    label_candidates,
    named,
    read_columns,
    split_column,
)
from harness.errors import UserError

SPLIT_TABLES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class OtherTableError(UserError):
    """A table that is none of these images."""


def find_tables(root, tree) -> dict[str, str]:
    """{split or "": path} of the tables that say by their names what they are.

    metadata.* or labels.* at the root, in a split's folder, or in one other; train.*, val.*, test.*
    at the root (not .parquet, which is rather the data set itself). Raises UserError for two of
    one kind.
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
            if name.lower().startswith(("metadata.", "labels.")):
                note("", top, name)
            elif _split_table(name):
                note(_split_table(name), top, name)
    inside = [
        (folder, name)
        for top in tops(tree) for folder in top.with_images() for name in folder.tables
        if name.lower().startswith(("metadata.", "labels."))
    ]  # fmt: skip
    below = [
        (folder, name)
        for folder in tree.with_images() for name in folder.tables
        if not split_of(folder.name) and _split_table(name)
    ]  # fmt: skip
    if not found:
        for folder, name in inside:
            if split_of(folder.name):
                note(split_of(folder.name), folder, name)
    if not found and len(inside) == 1:
        note("", *inside[0])
    if not found and len({folder.path for folder, _ in below}) == 1:
        for folder, name in below:
            note(_split_table(name), folder, name)
    return found


def _split_table(name):
    """The split of train.csv, val.csv, test.csv; None for other names."""
    stem, suffix = os.path.splitext(name.lower())
    return split_of(stem) if stem in SPLIT_TABLES and suffix != ".parquet" else None


def other_tables(root, tree, tables) -> list[str]:
    """The tables at the root that nobody reads, relative to it."""
    read = {os.path.abspath(table) for table in tables}
    paths = [f"{top.path}/{name}".lstrip("/") for top in tops(tree) for name in top.tables]
    return [path for path in paths if os.path.abspath(Path(root) / path) not in read]


class _Table(NamedTuple):
    """A table of labels, its rows matched with images."""

    path: str
    files: list  # of each row, as the table names them
    file_column: str
    label_column: str | None
    split_column: tuple | None  # (its name, the split of each row)
    images: Images  # that it may be about
    places: list  # of each row: which of the images, or None
    labels: list  # of each row, None without one
    columns: dict  # the other ones: {name: values}

    @property
    def name(self):
        return Path(self.path).name


def read_tables(root, tree, tables, file_column=None, label_column=None, by_folder=None) -> Listing:
    """The splits and labels that tables give to the images of a tree.

    tables: {split or "": path}; "" is for all splits. by_folder: the Listing by class folders,
    which stands for the splits without a table, and tells columns apart where one of them says the
    same. Raises UserError where over half of the rows have no file (OtherTableError), one file has
    two labels, or no image of train has a label.
    """
    listing = Listing({}, inside="folders of the splits")
    parts, all_images = split_images(tree), Images.of(tree)
    told, with_label, unlabelled = [], set(), set()
    folder_splits = by_folder.splits if by_folder else labelled_splits(tree)
    folder_splits = {} if "" in tables else folder_splits
    order = ("", "train", "validation", "test")
    for split, path in sorted(tables.items(), key=lambda item: order.index(item[0])):
        images = parts.get(split) or _others(all_images, parts) if split else all_images
        matched = _matched(root, path, split, images, all_images, parts, file_column)
        table = _labelled(matched, label_column, told, by_folder, split)
        if table is None and split in folder_splits:
            listing.notes.append(f"{Path(path).name} has no column of labels: its folders say them")
            continue
        table = table or matched
        told.append((table.name, table.file_column, table.label_column))
        if all(value is None for value in table.labels):
            rows = sorted({place for place in table.places if place is not None})
            paths = [table.images.paths[row] for row in rows]
            taken = with_label.union(listing.reported)
            listing.leave_unlabelled([path for path in paths if path not in taken])
            unlabelled.add(split)
        else:
            _add_table(listing, table, split, tables, parts, with_label)
    for name, images in folder_splits.items():
        if name not in listing.splits and name not in unlabelled:
            taken = with_label.union(listing.reported)
            rest = images.where(np.array([path not in taken for path in images.paths]))
            if len(rest):
                listing.splits[name] = rest
                with_label.update(rest.paths)
    if "train" not in listing.splits:
        raise UserError(
            f"{', '.join(tables.values())} gives no label to any image of train in {root}"
        )
    columns = dict.fromkeys(f"column {label} of {name}" for name, _, label in told if label)
    if columns:
        listing.labels_from = f"from {', '.join(columns)}"
    listing.notes.append("labels from " + ", ".join(
        f"{name} ({file} → {label or 'no label'})" for name, file, label in told
    ))  # fmt: skip
    _tell_images(listing, all_images, with_label, parts)
    return listing


def _matched(root, path, split, images, all_images, parts, file_column) -> _Table:
    """A table whose rows are matched with `images`, or with all images where most have no match."""
    columns = read_columns(Path(path))
    try:
        file, places = _match(path, columns, images, root, file_column)
    except OtherTableError:
        if split in parts or len(images) == len(all_images):
            raise
        images = all_images.where(np.ones(len(all_images), bool))
        file, places = _match(path, columns, images, root, file_column)
    others = {name: values for name, values in columns.items() if name != file}
    none = [None] * len(places)
    return _Table(path, columns[file], file, None, None, images, places, none, others)


def _labelled(table, label_column, told, by_folder, split) -> _Table | None:
    """The table with its columns of splits and labels; None where it has neither.

    Where it has splits alone, the labels are those of the class folders. told: of the tables
    before. Raises OtherTableError where class folders label the images and this table does not.
    """
    path, columns = table.path, dict(table.columns)
    split_of_rows = split_column(path, columns, label_column)
    if split_of_rows:
        del columns[split_of_rows[0]]
    images, places, by_path = table.images, table.places, _labels_by_path(by_folder)
    label = _label_column(path, columns, label_column, told, images, places, by_path)
    if label:
        labels = class_values(f"column '{label}' of {path}", columns.pop(label))
    elif split_of_rows:
        labels = [place is not None and by_path.get(images.paths[place]) for place in places]
        labels = [label or None for label in labels]
    elif by_folder and split in ("", "train"):
        raise OtherTableError(f"{path} has no column of labels")
    else:
        return None
    return table._replace(
        label_column=label, split_column=split_of_rows, labels=labels, columns=columns
    )


def _add_table(listing, table, split, tables, parts, with_label):
    """Add the splits of a table with labels to the listing, and their images to with_label."""
    path, images, places = table.path, table.images, table.places
    images.labels = _of_images(path, images, places, table.labels)
    images.others = {
        name: _of_images(path, images, places, values, check=False)
        for name, values in table.columns.items()
    }
    _tell_rows(listing, path, table.files, table.labels, images, places)
    labelled = np.array([value is not None for value in images.labels])
    with_label.update(images.paths[row] for row in np.flatnonzero(labelled))
    by_split = _splits_of(path, split, table.split_column, images, places, parts)
    for name, rows in by_split.items():
        if (labelled & rows).any():
            if name in listing.splits or (name != split and name in tables):
                raise UserError(f"{path} says split '{name}', and so does another table")
            listing.splits[name] = images.where(labelled & rows)
    _tell_no_split(listing, path, table.split_column, images, places, labelled)
    if table.split_column:
        listing.notes.append(f"splits from column {table.split_column[0]} of {table.name}")
        listing.has_splits = True


def _others(images, parts):
    """The images that are in no split's folder; all where there are none."""
    taken = {path for split in parts.values() for path in split.paths}
    rest = images.where(np.array([path not in taken for path in images.paths]))
    return rest if len(rest) else images


def _splits_of(path, split, said_split, images, places, parts) -> dict[str, np.ndarray]:
    """{split: bool (n,)} of the images of a table."""
    if split and not said_split:
        return {split: np.ones(len(images), bool)}
    of_folder = {image: name for name, part in parts.items() for image in part.paths}
    by_folder = np.array([of_folder.get(image) for image in images.paths], object)
    if said_split:
        column, splits = said_split
        by_column = np.array(_of_images(path, images, places, splits), object)
        both = (by_column != None) & (by_folder != None)  # noqa: E711
        wrong = np.flatnonzero(both & (by_column != by_folder)) if len(parts) > 1 else ()
        if len(wrong):
            raise UserError(
                f"{images.paths[wrong[0]]} is of split '{by_column[wrong[0]]}' by column {column} "
                f"of {path}, and its folder says another: give tables without that column, or a "
                "folder without splits"
            )
        by_folder = by_column
    return {name: by_folder == name for name in ("train", "validation", "test")}


def _labels_by_path(listing) -> dict[str, str]:
    """{path: label as text} of a Listing or of None."""
    parts = listing.splits.values() if listing else ()
    return {
        path: str(label)
        for part in parts
        for path, label in zip(part.paths, part.labels, strict=True)
    }


def _label_column(path, columns, given, told, images, places, known):
    """The column of labels of a table, or None.

    known: {path: class} by class folders: a column that says the same is the one, and free text is
    none.
    told: what was found for the tables before: those of other splits have train's column, or one
    that is called label, or none.
    """
    wanted = told[0][2] if told else given
    if told and (wanted or given):
        if (wanted or given) in columns:
            return wanted or given
        columns = {name: v for name, v in columns.items() if name.lower() in LABEL_COLUMNS}
        given = None
    kinds = {name: kind_of(values) for name, values in columns.items()}
    if given or not known:
        return find_label(path, kinds, given)
    candidates = label_candidates(kinds)
    values = {name: class_values(name, columns[name]) for name in candidates}
    same = [
        name for name in candidates
        if all(
            place is None or known.get(images.paths[place], str(value)) == str(value)
            for place, value in zip(places, values[name], strict=True)
        )
    ]  # fmt: skip
    if len(same) == 1:
        return same[0]
    found = find_label(path, kinds)
    if found and found.lower() not in LABEL_COLUMNS and len(set(values[found])) > len(places) / 2:
        return None
    return found


def _match(path, columns, images, root, given):
    """The column of files, and for each row the place of its image or None."""
    candidates = [named(path, columns, given, "--file_column")] if given else file_columns(columns)
    # One of another name is known by its cells
    every = candidates + [
        name for name, cells in columns.items()
        if not given and name not in candidates and (not candidates or _names_images(cells))
        and not re.search("mask|seg|annot|depth", name.lower())
    ]  # fmt: skip
    files = _Files(images, Path(root).resolve(), Path(path).resolve().parent)
    fitting, refused = {}, None
    for column in every:
        try:
            fitting[column] = files.places(path, column, columns[column])
        except UserError as error:
            refused = refused or error
    if not fitting and candidates:
        raise refused
    if not candidates and len(fitting) > 1:  # numbers of classes may be names of files, too
        fitting = {name: places for name, places in fitting.items() if _names_images(columns[name])}
    if not candidates and len(fitting) != 1:
        raise OtherTableError(
            f"{path} has no column of file names ({', '.join(FILE_COLUMNS)}): name it with "
            f"--file_column; its columns are {', '.join(columns)}"
        )
    (column, places), *others = fitting.items()
    for other, there in others:
        if any(a != b for a, b in zip(places, there, strict=True) if None not in (a, b)):
            raise UserError(
                f"{path} names other files in column '{column}' than in '{other}': name the right "
                "one with --file_column"
            )
    return column, places


def _names_images(cells):
    first = next((str(cell) for cell in cells if cell is not None), "")
    return os.path.splitext(first)[1].lower() in image_suffixes()


class _Files:
    """Finds the image that a cell of a table names.

    images: those it may be. root: their folder. beside: the folder of the table. Both absolute.
    """

    def __init__(self, images, root, beside):
        self.images, self.root = images, root
        self.start = os.path.relpath(beside, root)
        self.paths = [class_key(path) for path in images.paths]
        self.exact = {path: k for k, path in enumerate(self.paths)}
        self.loose: dict[str, list[int]] = {}  # by name and path, with and without suffix
        for k, path in enumerate(self.paths):
            stem = re.sub(r"[.][^./]*$", "", path)
            for end in {path.rpartition("/")[2], stem.rpartition("/")[2], path, stem}:
                self.loose.setdefault(end, []).append(k)
        self.ends: dict[str, list[int]] = {}
        self.folded: dict[str, list[int]] = {}

    def places(self, table, column, cells) -> list[int | None]:
        """The image of each row; raises OtherTableError where over half have none."""
        places = [self.place(table, "" if cell is None else str(cell).strip()) for cell in cells]
        missing = [cell for cell, place in zip(cells, places, strict=True) if place is None]
        if len(missing) * 2 > len(places):
            raise OtherTableError(
                f"{table}: {len(missing):,} of {len(places):,} rows have no image "
                f"({few(map(str, missing))} in column '{column}'): is it the table of these images?"
            )
        return places

    def place(self, table, cell) -> int | None:
        name = class_key(cell.replace("\\", "/"))
        if not name:
            return None
        if re.match("/|[A-Za-z]:/", name):
            return self._absolute(name)
        tried = [name if self.start == "." else f"{self.start}/{name}", name]
        tried.append(name.removeprefix(f"{self.root.name}/"))
        if "./" in "".join(tried) or "//" in name:
            tried = [os.path.relpath(os.path.join(self.root, path), self.root) for path in tried]
        place = next((self.exact[path] for path in tried if path in self.exact), None)
        if place is not None:
            return place
        found = next((self.loose[path] for path in tried if path in self.loose), [])
        if not found and "/" in name:
            found = self._by_end(name)
        found = found or self._in_other_case(name)
        if len(found) > 1:
            raise UserError(
                f"{table}: {cell} may be {few(self.images.paths[k] for k in found)}: write the "
                "path as well"
            )
        return found[0] if found else None

    def _absolute(self, name):
        """Of a path that may have been written on another machine.

        An image's whole path below the root, or the root's name and that, must be its end.
        """
        parts = name.split("/")
        ends = ("/".join(parts[n:]) for n in range(1, len(parts) - 1))
        for end in (name.removeprefix(f"{self.root}/"), *ends):
            for path in (end, end.removeprefix(f"{self.root.name}/")):
                if path in self.exact:
                    return self.exact[path]
        return None

    def _in_other_case(self, name):
        """The images of this path or name in other cases: 0.JPG for 0.jpg."""
        if not self.folded:
            for path, k in self.exact.items():
                for end in {path, path.rpartition("/")[2]}:
                    self.folded.setdefault(end.casefold(), []).append(k)
        return self.folded.get(name.casefold(), [])

    def _by_end(self, name):
        """The images whose path ends with this path."""
        if not self.ends:
            for k, path in enumerate(self.paths):
                parts = path.split("/")
                for n in range(1, len(parts)):
                    self.ends.setdefault("/".join(parts[n:]), []).append(k)
        return self.ends.get(name, [])


def _of_images(table, images, places, values, check=True):
    """The value of each image in a column, None without a row.

    check: raise UserError where two rows of one image differ.
    """
    found: list = [None] * len(images)
    for place, value in zip(places, values, strict=True):
        if place is None or value is None:
            continue
        if check and found[place] is not None and found[place] != value:
            raise UserError(
                f"{table} has {images.paths[place]} twice, with {found[place]!r} and {value!r}"
            )
        found[place] = value
    return found


def _tell_rows(listing, table, files, labels, images, places):
    """Say what of a table was not used."""
    name = Path(table).name
    missing = [file for file, place in zip(files, places, strict=True) if place is None]
    if missing:
        listing.left_out.append(
            f"{counted(len(missing), 'row')} of {name} without an image: {few(map(str, missing))}"
        )
    empty = [
        images.paths[place]
        for place, label in zip(places, labels, strict=True)
        if place is not None and label is None and images.labels[place] is None
    ]
    if empty:
        listing.reported += empty
        listing.left_out.append(
            f"{counted(len(empty), 'image')} without a label in {name}: {few(empty)}"
        )


def _tell_no_split(listing, path, said_split, images, places, known):
    """Say which labelled images a column of splits leaves to none of them."""
    if not said_split or None not in said_split[1]:
        return
    splits = _of_images(path, images, places, said_split[1])
    rows = [k for k in np.flatnonzero(known) if splits[k] is None]
    paths = [images.paths[k] for k in rows]
    if paths:
        listing.reported += paths
        listing.left_out.append(
            f"{counted(len(paths), 'image')} of no split by column {said_split[0]}: {few(paths)}"
        )


def _tell_images(listing, images, with_label, parts):
    """Say which images have no row; those of a whole split are unlabelled."""
    reported = with_label.union(listing.reported)
    for split, part in parts.items():
        if split != "train" and not any(path in reported for path in part.paths):
            listing.leave_unlabelled(part.paths)
            reported.update(part.paths)
    without = [path for path in images.paths if path not in reported]
    if without:
        listing.reported += without
        listing.left_out.append(f"{counted(len(without), 'image')} without a row: {few(without)}")


def _rename(by_table, told, known):
    """Give the classes of a table the folders' names where each is one folder's, under a number."""
    pairs = {(told[path], label) for path, label in known.items() if path in told}
    names = dict(pairs)
    if names.keys() & set(names.values()):  # not another way of naming them
        return
    if len(pairs) == len(names) == len(set(names.values())) and set(told.values()) <= set(names):
        for images in by_table.splits.values():
            images.labels = [names[str(label)] for label in images.labels]


def compared(root, by_folder, by_table, tables) -> Listing:
    """What stands where class folders and tables both say the classes: tables of splits, else the
    one that has more images.

    Raises UserError where they differ, or where each has images that the other has not.
    """
    names = ", ".join(Path(path).name for path in tables.values())
    told = _labels_by_path(by_table)
    _rename(by_table, told, _labels_by_path(by_folder))
    told = _labels_by_path(by_table)
    ways = "--labels FILE takes the table, --layout splits or classes the folders"
    for images in by_folder.splits.values():
        for path, label in zip(images.paths, images.labels, strict=True):
            if path in told and told[path] != str(label):
                raise UserError(
                    f"{root} has class folders and {names}, and they differ: {path} is of class "
                    f"{label!r} by its folder and {told[path]!r} by the table. {ways}"
                )
    if "" not in tables:
        return by_table
    in_folders = {path for images in by_folder.splits.values() for path in images.paths}
    if in_folders <= told.keys() or by_table.has_splits:
        return by_table
    more = [path for path in told if path not in in_folders]
    if more:
        raise UserError(
            f"{root} has class folders and {names}, which has labels of other images as well, as "
            f"{few(more, 1)}, but not of all in the folders. {ways}"
        )
    by_folder.notes.append(f"{names} says the same classes as the folders")
    return by_folder

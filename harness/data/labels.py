"""Labels that tables give to the images of a folder: metadata.csv, train.csv, --labels FILE.

A row names its file by a path relative to the table, to the folder of its split or to any folder
below, with or without suffix.
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
    check_column,
    class_values,
    file_columns,
    find_label,
    kind_of,
    label_candidates,
    read_columns,
    split_column,
)
from harness.errors import UserError

SPLIT_TABLES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class OtherTableError(UserError):
    """A table that does not say the classes of these images."""


def find_tables(root, tree) -> dict[str, str]:
    """{split or "": path} of the tables of labels, which have one of these names:

    metadata.* or labels.* at the root, in a split's folder, or in a single other folder; train.*,
    val.*, test.* at the root or in a single other folder (not .parquet, which is more likely the
    data set itself). Raises UserError for two that say the same.
    """
    tables: dict[str, str] = {}

    def note(split, folder, name):
        path = str(Path(root) / folder.path / name)
        if split in tables or (tables and "" in (split, *tables)):
            raise UserError(
                f"{root} has the tables {', '.join([*tables.values(), path])}: name the right one "
                "with --labels FILE, or say with --layout that the folders are the classes"
            )
        tables[split] = path

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
    if not tables:
        for folder, name in inside:
            if split_of(folder.name):
                note(split_of(folder.name), folder, name)
    if not tables and len(inside) == 1:
        note("", *inside[0])
    if not tables and len({folder.path for folder, _ in below}) == 1:
        for folder, name in below:
            note(_split_table(name), folder, name)
    return tables


def _split_table(name):
    """The split of train.csv, val.csv, test.csv; None for other names."""
    stem, suffix = os.path.splitext(name.lower())
    return split_of(stem) if stem in SPLIT_TABLES and suffix != ".parquet" else None


def other_tables(root, tree, tables) -> list[str]:
    """The tables at the root that are not among `tables`, relative to it."""
    read = {os.path.abspath(table) for table in tables}
    paths = [f"{top.path}/{name}".lstrip("/") for top in tops(tree) for name in top.tables]
    return [path for path in paths if os.path.abspath(Path(root) / path) not in read]


class _Table(NamedTuple):
    """A table of labels, its rows matched with images."""

    path: str
    files: list  # of each row: the file, as the table names it
    file_column: str
    label_column: str | None
    splits_column: tuple | None  # (its name, the split of each row)
    images: Images  # the images among which the files are looked for
    matches: list  # of each row: the index of its image, or None
    labels: list  # of each row, None without a label
    columns: dict  # further ones, {name: values}

    @property
    def name(self):
        return Path(self.path).name


def read_tables(root, tree, tables, file_column=None, label_column=None, by_folder=None) -> Listing:
    """The splits and labels that tables give to the images of a tree.

    tables: {split or "": path}; "" is for all splits. by_folder: the Listing by class folders. It
    holds for the splits without a table, and decides which column has the labels where one of
    several agrees with it. Raises UserError where over half of the rows have no file
    (OtherTableError), one file has two labels, or no image of train has a label.
    """
    listing = Listing({}, inside="folders of the splits")
    split_folders, all_images = split_images(tree), Images.of(tree)
    summaries, with_label, unlabelled = [], set(), set()
    class_folders = by_folder.splits if by_folder else labelled_splits(tree)
    class_folders = {} if "" in tables else class_folders
    order = ("", "train", "validation", "test")
    for split, path in sorted(tables.items(), key=lambda item: order.index(item[0])):
        images = all_images
        if split:
            images = split_folders.get(split) or _outside(all_images, split_folders)
        rows = _match_rows(root, path, split, images, all_images, split_folders, file_column)
        table = _add_labels(rows, label_column, summaries, by_folder, split)
        if table is None and split in class_folders:
            listing.notes.append(f"{Path(path).name} has no column of labels: the folders say them")
            continue
        table = table or rows
        summaries.append((table.name, table.file_column, table.label_column))
        if all(value is None for value in table.labels):
            indices = sorted({index for index in table.matches if index is not None})
            paths = [table.images.paths[index] for index in indices]
            counted_paths = with_label.union(listing.reported)
            listing.leave_unlabelled([path for path in paths if path not in counted_paths])
            unlabelled.add(split)
        else:
            _add_table(listing, table, split, tables, split_folders, with_label)
    for name, images in class_folders.items():
        if name not in listing.splits and name not in unlabelled:
            counted_paths = with_label.union(listing.reported)
            rest = images.select(np.array([path not in counted_paths for path in images.paths]))
            if len(rest):
                listing.splits[name] = rest
                with_label.update(rest.paths)
    if "train" not in listing.splits:
        raise UserError(
            f"{', '.join(tables.values())} gives no label to any image of train in {root}"
        )
    columns = dict.fromkeys(f"column {label} of {name}" for name, _, label in summaries if label)
    if columns:
        listing.labels_from = f"from {', '.join(columns)}"
    listing.notes.append("labels from " + ", ".join(
        f"{name} ({file} → {label or 'no label'})" for name, file, label in summaries
    ))  # fmt: skip
    _note_images(listing, all_images, with_label, split_folders)
    return listing


def _match_rows(root, path, split, images, all_images, split_folders, file_column) -> _Table:
    """A table, its rows matched with `images`; with all images where most have no match there."""
    columns = read_columns(Path(path))
    try:
        file, matches = _match(path, columns, images, root, file_column)
    except OtherTableError:
        if split in split_folders or len(images) == len(all_images):
            raise
        images = all_images.select(np.ones(len(all_images), bool))
        file, matches = _match(path, columns, images, root, file_column)
    further = {name: values for name, values in columns.items() if name != file}
    labels = [None] * len(matches)
    return _Table(path, columns[file], file, None, None, images, matches, labels, further)


def _add_labels(table, label_column, summaries, by_folder, split) -> _Table | None:
    """The table with its columns of splits and labels; None where it has neither.

    A table with splits alone gets the labels of the class folders. summaries: see `_label_column`.
    Raises OtherTableError where class folders label the images and this table does not.
    """
    path, columns = table.path, dict(table.columns)
    split_of_rows = split_column(path, columns, label_column)
    if split_of_rows:
        del columns[split_of_rows[0]]
    images, matches, by_path = table.images, table.matches, _labels_by_path(by_folder)
    label = _label_column(path, columns, label_column, summaries, images, matches, by_path)
    if label:
        labels = class_values(f"column '{label}' of {path}", columns.pop(label))
    elif split_of_rows:
        labels = [index is not None and by_path.get(images.paths[index]) for index in matches]
        labels = [label or None for label in labels]
    elif by_folder and split in ("", "train"):
        raise OtherTableError(f"{path} has no column of labels")
    else:
        return None
    return table._replace(
        label_column=label, splits_column=split_of_rows, labels=labels, columns=columns
    )


def _add_table(listing, table, split, tables, split_folders, with_label):
    """Add the splits of a table with labels to the listing, and their images to with_label."""
    path, images, matches = table.path, table.images, table.matches
    images.labels = _values_of_images(path, images, matches, table.labels)
    images.columns = {
        name: _values_of_images(path, images, matches, values, check=False)
        for name, values in table.columns.items()
    }
    _note_rows(listing, path, table.files, table.labels, images, matches)
    labelled = np.array([value is not None for value in images.labels])
    with_label.update(images.paths[row] for row in np.flatnonzero(labelled))
    masks = _splits_of(path, split, table.splits_column, images, matches, split_folders)
    for name, mask in masks.items():
        if (labelled & mask).any():
            if name in listing.splits or (name != split and name in tables):
                raise UserError(f"{path} says split '{name}', and so does another table")
            listing.splits[name] = images.select(labelled & mask)
    _note_no_split(listing, path, table.splits_column, images, matches, labelled)
    if table.splits_column:
        listing.notes.append(f"splits from column {table.splits_column[0]} of {table.name}")
        listing.has_splits = True


def _outside(images, split_folders):
    """The images in no split's folder; all images if that leaves none."""
    inside = {path for split in split_folders.values() for path in split.paths}
    rest = images.select(np.array([path not in inside for path in images.paths]))
    return rest if len(rest) else images


def _splits_of(path, split, splits_column, images, matches, split_folders) -> dict[str, np.ndarray]:
    """{split: bool (n,)} of the images of a table."""
    if split and not splits_column:
        return {split: np.ones(len(images), bool)}
    by_path = {path: name for name, folder in split_folders.items() for path in folder.paths}
    by_folder = np.array([by_path.get(path) for path in images.paths], object)
    if splits_column:
        column, splits = splits_column
        by_column = np.array(_values_of_images(path, images, matches, splits), object)
        in_both = (by_column != None) & (by_folder != None)  # noqa: E711
        differs = in_both & (by_column != by_folder)
        if len(split_folders) > 1 and differs.any():
            k = differs.argmax()
            raise UserError(
                f"{images.paths[k]} is of split '{by_column[k]}' by column {column} of {path}, but "
                "its folder says another: give tables without that column, or a folder without "
                "splits"
            )
        by_folder = by_column
    return {name: by_folder == name for name in ("train", "validation", "test")}


def _labels_by_path(listing) -> dict[str, str]:
    """{path: label as text} of a Listing; empty for None."""
    splits = listing.splits.values() if listing else ()
    return {
        path: str(label)
        for images in splits
        for path, label in zip(images.paths, images.labels, strict=True)
    }


def _label_column(path, columns, label_column, summaries, images, matches, folder_labels):
    """The column of labels of a table, or None.

    label_column: of the flag, or None.
    summaries: (name, file column, label column) of the tables that were read before. After the
        first one, a table has the labels in the same column, in one called label, or in none.
    folder_labels: {path: class} by class folders. A column that says the same holds the labels;
        one of free text does not.
    """
    if summaries and (expected := summaries[0][2] or label_column):
        if expected in columns:
            return expected
        columns = {name: v for name, v in columns.items() if name.lower() in LABEL_COLUMNS}
        label_column = None
    kinds = {name: kind_of(values) for name, values in columns.items()}
    if label_column or not folder_labels:
        return find_label(path, kinds, label_column)
    candidates = label_candidates(kinds)
    values = {name: class_values(name, columns[name]) for name in candidates}
    same = [
        name for name in candidates
        if all(
            index is None or folder_labels.get(images.paths[index], str(value)) == str(value)
            for index, value in zip(matches, values[name], strict=True)
        )
    ]  # fmt: skip
    if len(same) == 1:
        return same[0]
    column = find_label(path, kinds)
    if not column or column.lower() in LABEL_COLUMNS:
        return column
    is_free_text = len(set(values[column])) > len(matches) / 2
    return None if is_free_text else column


def _match(path, columns, images, root, file_column):
    """The column of files, and for each row the index of its image or None."""
    if file_column:
        candidates = [check_column(path, columns, file_column, "--file_column")]
    else:
        candidates = file_columns(columns)
    # A column with another name is recognised by its cells
    tried_columns = candidates + [
        name for name, cells in columns.items()
        if not file_column and name not in candidates and (not candidates or _names_images(cells))
        and not re.search("mask|seg|annot|depth", name.lower())
    ]  # fmt: skip
    files = _Files(images, Path(root).resolve(), Path(path).resolve().parent)
    fits, first_error = {}, None
    for column in tried_columns:
        try:
            fits[column] = files.matches(path, column, columns[column])
        except UserError as error:
            first_error = first_error or error
    if not fits and candidates:
        raise first_error
    if not candidates and len(fits) > 1:  # numbers of classes may be names of files, too
        fits = {name: matches for name, matches in fits.items() if _names_images(columns[name])}
    if not candidates and len(fits) != 1:
        raise OtherTableError(
            f"{path} has no column of file names ({', '.join(FILE_COLUMNS)}): name it with "
            f"--file_column; its columns are {', '.join(columns)}"
        )
    (column, matches), *rivals = fits.items()
    for rival, rival_matches in rivals:
        if any(a != b for a, b in zip(matches, rival_matches, strict=True) if None not in (a, b)):
            raise UserError(
                f"{path} names other files in column '{column}' than in '{rival}': name the right "
                "one with --file_column"
            )
    return column, matches


def _names_images(cells):
    """Whether the first cell that is not empty ends as the name of an image does."""
    name = next((str(cell) for cell in cells if cell is not None), "")
    return os.path.splitext(name)[1].lower() in image_suffixes()


class _Files:
    """Finds the image that a cell of a table names.

    images: the images to choose from. root: their folder. table_folder: the folder of the table.
    Both folders are absolute.
    """

    def __init__(self, images, root, table_folder):
        self.images, self.root = images, root
        self.start = os.path.relpath(table_folder, root)
        self.paths = [class_key(path) for path in images.paths]
        self.exact = {path: k for k, path in enumerate(self.paths)}
        self.loose: dict[str, list[int]] = {}  # by name and path, with and without suffix
        for k, path in enumerate(self.paths):
            stem = re.sub(r"[.][^./]*$", "", path)
            for end in {path.rpartition("/")[2], stem.rpartition("/")[2], path, stem}:
                self.loose.setdefault(end, []).append(k)
        self.ends: dict[str, list[int]] = {}
        self.folded: dict[str, list[int]] = {}

    def matches(self, table, column, cells) -> list[int | None]:
        """The index of each row's image, or None; OtherTableError where over half have none."""
        matches = [self.find(table, "" if cell is None else str(cell).strip()) for cell in cells]
        missing = [cell for cell, index in zip(cells, matches, strict=True) if index is None]
        if len(missing) * 2 > len(matches):
            raise OtherTableError(
                f"{table}: {len(missing):,} of {len(matches):,} rows have no image "
                f"({few(map(str, missing))} in column '{column}'): is it the table of these images?"
            )
        return matches

    def find(self, table, cell) -> int | None:
        """The index of the image that a cell names, or None; UserError where it may be several."""
        name = class_key(cell.replace("\\", "/"))
        if not name:
            return None
        if re.match("/|[A-Za-z]:/", name):
            return self._absolute(name)
        paths = [name if self.start == "." else f"{self.start}/{name}", name]
        paths.append(name.removeprefix(f"{self.root.name}/"))
        if "./" in "".join(paths) or "//" in name:
            paths = [os.path.relpath(os.path.join(self.root, path), self.root) for path in paths]
        index = next((self.exact[path] for path in paths if path in self.exact), None)
        if index is not None:
            return index
        indices = next((self.loose[path] for path in paths if path in self.loose), [])
        if not indices and "/" in name:
            indices = self._by_end(name)
        indices = indices or self._in_other_case(name)
        if len(indices) > 1:
            raise UserError(
                f"{table}: {cell} may be {few(self.images.paths[k] for k in indices)}: write the "
                "path as well"
            )
        return indices[0] if indices else None

    def _absolute(self, name):
        """The index for an absolute path, perhaps of another machine, or None.

        It must end with an image's path relative to the root, or with the root's name and that.
        """
        folders = name.split("/")
        ends = ("/".join(folders[n:]) for n in range(1, len(folders) - 1))
        for end in (name.removeprefix(f"{self.root}/"), *ends):
            for path in (end, end.removeprefix(f"{self.root.name}/")):
                if path in self.exact:
                    return self.exact[path]
        return None

    def _in_other_case(self, name):
        """The indices of images with this path or name in another case: 0.JPG for 0.jpg."""
        if not self.folded:
            for path, k in self.exact.items():
                for end in {path, path.rpartition("/")[2]}:
                    self.folded.setdefault(end.casefold(), []).append(k)
        return self.folded.get(name.casefold(), [])

    def _by_end(self, name):
        """The indices of images whose path ends with this path."""
        if not self.ends:
            for k, path in enumerate(self.paths):
                folders = path.split("/")
                for n in range(1, len(folders)):
                    self.ends.setdefault("/".join(folders[n:]), []).append(k)
        return self.ends.get(name, [])


def _values_of_images(table, images, matches, values, check=True):
    """The value of each image in a column of a table, None for an image without a row.

    check: whether to raise UserError where two rows of one image differ.
    """
    column: list = [None] * len(images)
    for index, value in zip(matches, values, strict=True):
        if index is None or value is None:
            continue
        if check and column[index] is not None and column[index] != value:
            raise UserError(
                f"{table} has {images.paths[index]} twice, with {column[index]!r} and {value!r}"
            )
        column[index] = value
    return column


def _note_rows(listing, table, files, labels, images, matches):
    """Add lines on the rows and images of a table that are not used."""
    name = Path(table).name
    missing = [file for file, index in zip(files, matches, strict=True) if index is None]
    if missing:
        listing.left_out.append(
            f"{counted(len(missing), 'row')} of {name} without an image: {few(map(str, missing))}"
        )
    empty = [
        images.paths[index]
        for index, label in zip(matches, labels, strict=True)
        if index is not None and label is None and images.labels[index] is None
    ]
    if empty:
        listing.reported += empty
        listing.left_out.append(
            f"{counted(len(empty), 'image')} without a label in {name}: {few(empty)}"
        )


def _note_no_split(listing, path, splits_column, images, matches, labelled):
    """Add a line on the labelled images that are of no split by the column of splits."""
    if not splits_column or None not in splits_column[1]:
        return
    splits = _values_of_images(path, images, matches, splits_column[1])
    rows = [k for k in np.flatnonzero(labelled) if splits[k] is None]
    paths = [images.paths[k] for k in rows]
    if paths:
        listing.reported += paths
        listing.left_out.append(
            f"{counted(len(paths), 'image')} of no split by column {splits_column[0]}: {few(paths)}"
        )


def _note_images(listing, images, with_label, split_folders):
    """Add a line on the images without a row; where a whole split has none, it is unlabelled."""
    reported = with_label.union(listing.reported)
    for split, in_folder in split_folders.items():
        if split != "train" and not any(path in reported for path in in_folder.paths):
            listing.leave_unlabelled(in_folder.paths)
            reported.update(in_folder.paths)
    without = [path for path in images.paths if path not in reported]
    if without:
        listing.reported += without
        listing.left_out.append(f"{counted(len(without), 'image')} without a row: {few(without)}")


def _rename(by_table, table_labels, folder_labels):
    """Give a table's classes the folders' names if they are the same classes, say by numbers."""
    pairs = {
        (table_labels[path], label) for path, label in folder_labels.items() if path in table_labels
    }
    names = dict(pairs)
    if names.keys() & set(names.values()):  # then these are not other names of the same classes
        return
    one_to_one = len(pairs) == len(names) == len(set(names.values()))
    if one_to_one and set(table_labels.values()) <= set(names):
        for images in by_table.splits.values():
            images.labels = [names[str(label)] for label in images.labels]


def choose_listing(root, by_folder, by_table, tables) -> Listing:
    """The Listing to use where class folders and tables both say the classes.

    That is the table's if there are tables of splits, else the one with more images. Raises
    UserError where they differ, or where each has images that the other has not.
    """
    names = ", ".join(Path(path).name for path in tables.values())
    table_labels = _labels_by_path(by_table)
    _rename(by_table, table_labels, _labels_by_path(by_folder))
    table_labels = _labels_by_path(by_table)
    ways = "--labels FILE takes the table, --layout splits or classes the folders"
    for images in by_folder.splits.values():
        for path, label in zip(images.paths, images.labels, strict=True):
            if path in table_labels and table_labels[path] != str(label):
                raise UserError(
                    f"{root} has class folders and {names}, and they differ: {path} is of class "
                    f"{label!r} by its folder and {table_labels[path]!r} by the table. {ways}"
                )
    if "" not in tables:
        return by_table
    in_folders = {path for images in by_folder.splits.values() for path in images.paths}
    if in_folders <= table_labels.keys() or by_table.has_splits:
        return by_table
    table_only = [path for path in table_labels if path not in in_folders]
    if table_only:
        raise UserError(
            f"{root} has class folders and {names}, which has labels of other images as well, as "
            f"{few(table_only, 1)}, but not of all in the folders. {ways}"
        )
    by_folder.notes.append(f"{names} says the same classes as the folders")
    return by_folder

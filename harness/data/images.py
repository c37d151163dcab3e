"""A folder of images, with or without tables of labels, as `datasets` of paths and classes."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from harness.console import printable
from harness.data.folders import GENERIC, other_ways, read_folder, read_pattern, split_of
from harness.data.labels import (
    OtherTableError,
    choose_listing,
    find_tables,
    other_tables,
    read_tables,
)
from harness.data.listing import (
    EXPECTED,
    Images,
    class_key,
    count_left_out,
    counted,
    few,
    remove_repeated,
    scan,
)
from harness.data.parquet import parquet_files, parquet_splits
from harness.errors import UserError


@dataclass
class Stored:
    """The stored splits of a data set, and what the plan says about them."""

    splits: dict  # name -> datasets.Dataset
    label_column: str | None = None  # None: still to be found
    labels_from: str = ""  # where the labels come from; "": the label column
    source: str = ""  # id@revision of the Hub, or a folder
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    content: dict[str, list] = field(default_factory=dict)  # split -> [images, sha256], of folders

    def at(self, source):
        """The same splits with this source."""
        return replace(self, source=source)


def load_images(
    root, tree=None, *, layout="auto", label_pattern=None, labels=None, file_column=None,
    label_column=None, classes=None, choose=None,
) -> Stored:  # fmt: skip
    """List a folder of images and give its splits as data sets with the columns image and label.

    There are two hashes. The fingerprint of each data set (root, names, sizes, times, labels) is
    the key of its decoded pixels in the local cache. `content` (relative paths, sizes, labels) is
    the same on another machine and in another folder. A file that changes without another size or
    time is taken for the old one.

    tree: the result of `scan`, if there is one already. choose: a function from the names of the
    splits to those that are used; the classes of other splits do not matter.

    Raises UserError for all that harness.data.folders and harness.data.tables refuse, for classes
    of another split that train lacks, and for a --classes file that does not name the classes.
    """
    root = Path(root)
    tree = tree or scan(root)
    listing, tables = _read(root, tree, layout, label_pattern, labels, file_column, label_column)
    count_left_out(listing, tree, root, tables)
    if not label_pattern and (unread := other_tables(root, tree, tables)):
        listing.notes.append(
            f"not read: {few(unread)}; --labels {unread[0]} takes the labels from it"
        )
    used = [split for split in (choose or list)(listing.splits) if split]
    for split in [split for split in listing.splits if split not in used]:
        listing.left_out.append(
            f"{counted(len(listing.splits.pop(split)), 'image')} of split '{split}', not asked for"
        )
    remove_repeated(listing)
    names = _classes(listing, classes, used[0])
    if len(names) == 1 and not labels and not label_pattern:
        parent = next((f for f in tree.walk() if f.name == names[0] and len(f.folders) > 1), None)
        inside = (
            f" (if the classes are the folders in it, give {root / parent.path})" if parent else ""
        )
        raise UserError(f"{root} has 1 class, {names[0]}{inside}: {EXPECTED}. {other_ways(tree)}")
    stored = Stored(
        {}, "label", listing.labels_from, notes=listing.notes, left_out=listing.left_out
    )
    for split, images in listing.splits.items():
        indices = {name: k for k, name in enumerate(names)}
        numbers = np.array([indices[label] for label in images.labels], np.int64)
        stored.splits[split] = _dataset(root, images, numbers, names)
        digest = hashlib.sha256()
        order = sorted(range(len(images)), key=images.paths.__getitem__)
        for k in order:
            line = f"{images.paths[k]}\0{images.stats[k, 0]}\0{images.labels[k]}\n"
            digest.update(line.encode())
        stored.content[split] = [len(images), digest.hexdigest()]
    return stored


def _read(root, tree, layout, label_pattern, labels, file_column, label_column):
    """(Listing, paths of the tables that were read) of a folder of images."""
    columns = [("file_column", file_column), ("label_column", label_column)]
    columns = [f"--{flag} {value}" for flag, value in columns if value]
    if label_pattern:
        if columns:
            raise UserError(f"{columns[0]} has no effect: --label_pattern says the classes")
        return read_pattern(root, tree, label_pattern), ()
    flag_tables = _tables_of_flag(labels, root) if labels else {}
    tables = flag_tables or (find_tables(root, tree) if layout == "auto" else {})
    if not tables:
        if columns:
            raise UserError(
                f"{columns[0]}: {root} has no table of labels (metadata.csv, train.csv); name one "
                "with --labels FILE"
            )
        return _by_folder_or_parquet(root, tree, layout)
    by_folder = None
    if "" not in flag_tables:
        with contextlib.suppress(UserError):  # without class folders, the tables say the classes
            by_folder = read_folder(root, tree, "auto")
        if by_folder and not _may_be_classes(set(by_folder.splits["train"].labels), tables):
            by_folder = None
    names = ", ".join(Path(path).name for path in tables.values())
    try:
        by_table = read_tables(root, tree, tables, file_column, label_column, by_folder)
    except OtherTableError as error:
        if flag_tables or columns or not by_folder:
            raise
        by_folder.notes.append(f"{names} is not used, but the class folders are: {error}")
        return by_folder, tables.values()
    if by_folder and not flag_tables:
        return choose_listing(root, by_folder, by_table, tables), tables.values()
    return by_table, tables.values()


def _by_folder_or_parquet(root, tree, layout):
    """Labels by class folders; without these, by parquet files that name the images."""
    files = parquet_files(tree) if layout == "auto" else []
    folder_error = None
    try:
        listing = read_folder(root, tree, layout)
        if not files or len(set(listing.splits["train"].labels)) > 1:
            return listing, ()
    except UserError as error:
        if not files:
            raise
        folder_error = error
    splits = parquet_splits(files)
    if any(len(paths) > 1 for paths in splits.values()):
        raise UserError(
            f"{root}: {few(files)} are tables of labels: join those of one split into one file"
        )
    tables = {split: str(root / paths[0]) for split, paths in splits.items()}
    if len(tables) == 1:
        tables = {"": next(iter(tables.values()))}
    try:
        return read_tables(root, tree, tables), tables.values()
    except OtherTableError:
        if folder_error:
            raise folder_error from None
        return listing, ()


def _may_be_classes(names, tables) -> bool:
    """Whether folders of these names can be classes where there are tables as well."""
    if tables and all(name.lower() in GENERIC or split_of(name) for name in names):
        return False  # train/ and masks/
    return len(names) > 1


def _tables_of_flag(value, root) -> dict[str, str]:
    """{split or "": path} of --labels FILE or train=FILE,val=FILE."""
    tables = {}
    items = re.split(r",\s*", value)
    if not all(re.match(r"\w+=", item) for item in items):
        items = [f"={value}"]
    for item in items:
        split, _, path = item.partition("=")
        if split and not split_of(split):
            raise UserError(f"--labels {item}: {split} is no split (train, val or test)")
        split = split and split_of(split)
        if split in tables:
            raise UserError(f"--labels {value} names two tables for one split")
        path = Path(path).expanduser()
        tables[split] = str(path if path.is_file() else Path(root) / path)
    return tables


def _classes(listing, file, train_split) -> list[str]:
    """The names of the classes in order; turns the labels of all splits into these names."""
    labels = set().union(*(images.labels for images in listing.splits.values()))
    if all(isinstance(label, int) for label in labels):
        order = [str(label) for label in sorted(labels)]
    else:
        order = sorted({str(label) for label in labels})
    for images in listing.splits.values():
        images.labels = [str(label) for label in images.labels]
    train = set(listing.splits[train_split].labels)
    lower: dict[str, str] = {}
    for name in sorted(train):
        if name.casefold() in lower:
            listing.notes.append(f"warning: {lower[name.casefold()]} and {name} are two classes")
        lower.setdefault(name.casefold(), name)
    for split, images in listing.splits.items():
        unknown = sorted(set(images.labels) - train)
        if unknown:
            name = unknown[0].casefold()
            close = difflib.get_close_matches(name, lower, n=1) if name not in lower else [name]
            hint = f" ({train_split} has {lower[close[0]]})" if close else ""
            raise UserError(
                f"split '{split}' has {few(map(repr, unknown))}, which {train_split} does not have"
                f"{hint}: give classes the same names in all splits, or leave that split out "
                "(--val_split none, --test_split none)"
            )
    if not file:
        return order
    try:
        with open(file, encoding="utf-8-sig") as lines:
            names = [class_key(line.rstrip("\r\n")) for line in lines if line.strip()]
        names = [name if name in order else name.strip() for name in names]
    except OSError as error:
        raise UserError(f"--classes {file}: {error.strerror}") from None
    except UnicodeError:
        raise UserError(f"--classes {file} is not in UTF-8: save it as UTF-8") from None
    twice = [name for name, count in Counter(names).items() if count > 1]
    missing = [name for name in order if name not in set(names)]
    if twice or missing:
        fault = f"{few(twice)} is there twice" if twice else f"{few(missing)} is missing"
        raise UserError(f"--classes {file}: {fault}; it must name every class once, one on a line")
    return names


def _dataset(root, images: Images, numbers, names):
    """A datasets.Dataset of the images' paths, their classes and further columns of a table."""
    import datasets
    import pyarrow

    base = f"{root.resolve()}/"
    paths = pyarrow.array([base + path for path in images.paths], pyarrow.string())
    empty = pyarrow.nulls(len(images), pyarrow.binary())
    columns = {
        "image": pyarrow.StructArray.from_arrays([empty, paths], ["bytes", "path"]),
        "label": pyarrow.array(numbers),
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    for name, values in images.columns.items():
        name = name if name not in columns else f"table_{name}"
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError, UnicodeError):
            texts = [None if v is None else printable(v) for v in values]  # mixed types
            columns[name] = pyarrow.array(texts)
        features[name] = datasets.features.features.generate_from_arrow_type(columns[name].type)
    digest = hashlib.blake2b(base.encode(), digest_size=8)
    digest.update("\0".join([*images.paths, *names]).encode())
    digest.update(images.stats[:, :2].tobytes() + numbers.tobytes())
    digest.update(repr(images.columns).encode())
    return datasets.Dataset(
        datasets.table.InMemoryTable(pyarrow.table(columns)),
        info=datasets.DatasetInfo(features=datasets.Features(features)),
        fingerprint=digest.hexdigest(),
    )

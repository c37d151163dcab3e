"""The tree of a folder of images, and what is used of it: splits, classes, what is left out."""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from harness.data.formats import image_suffixes, why_left_out
from harness.errors import UserError

IGNORED = {  # as are all names that begin with a dot
    "__macosx", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found",
    "system volume information",
}  # fmt: skip
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
EXPECTED = "expected CLASS/*.jpg or train/CLASS/*.jpg"


@dataclass
class Folder:
    """A folder and what is in it, without hidden files and folders."""

    name: str
    path: str  # relative to the root, with /; "" for the root
    folders: list[Folder] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # names
    stats: np.ndarray | None = None  # int64 (images, 4): size, time in ns, device, inode
    tables: list[str] = field(default_factory=list)  # names of files that may be tables of labels
    other_files: Counter = field(default_factory=Counter)  # suffix -> files that are no images
    skipped: dict[str, list[str]] = field(default_factory=dict)  # kind, as "broken link" -> paths
    total: int = 0  # images in it and below

    def walk(self):
        """This folder and all below it."""
        todo = [self]
        while todo:
            folder = todo.pop()
            yield folder
            todo += reversed(folder.folders)

    def with_images(self) -> list[Folder]:
        """Its folders with an image in them or below."""
        return [folder for folder in self.folders if folder.total]

    def shown(self) -> str:
        """The folder as messages name it."""
        return f"{self.path or '.'}/"


def hidden(name) -> bool:
    """Whether a file or folder of this name is ignored."""
    return name.startswith(".") or name.lower() in IGNORED


def scan(root) -> Folder:
    """The tree below `root`. Follows links, and raises UserError for one that leads in a circle."""
    suffixes = image_suffixes()
    top = Folder("", "")
    todo = [(top, os.fspath(root), (_identity(os.stat(root)),))]
    order = []
    with tqdm(unit=" files", unit_scale=True, delay=3, leave=False, desc="listing images") as bar:
        while todo:
            folder, path, above = todo.pop()
            order.append(folder)
            try:
                with os.scandir(path) as listed:
                    entries = sorted(listed, key=lambda entry: entry.name)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            stats, inside = [], []
            for entry in entries:
                if hidden(entry.name):
                    continue
                kind = _kind(entry)
                if kind == "file":
                    _add_file(folder, entry, suffixes, stats)
                elif kind == "folder":
                    child = Folder(entry.name, f"{folder.path}/{entry.name}".lstrip("/"))
                    folder.folders.append(child)
                    key = _identity(entry.stat()) or entry.path
                    if key in above:
                        raise UserError(f"{entry.path} is a link to a folder that it lies in")
                    inside.append((child, entry.path, (*above, key)))
                else:
                    paths = folder.skipped.setdefault(kind, [])
                    paths.append(f"{folder.path}/{entry.name}".lstrip("/"))
            folder.stats = np.array(stats, np.int64).reshape(-1, 4)
            bar.update(len(entries))
            todo += reversed(inside)
    for folder in reversed(order):  # a folder comes after all that lie in it
        folder.total = len(folder.images) + sum(child.total for child in folder.folders)
    return top


def _identity(status):
    """What all links to one folder have in common; None if the file system has no such numbers."""
    return (status.st_dev, status.st_ino) if status.st_ino else None


def _add_file(folder, entry, suffixes, stats):
    """Add a file to the folder: as an image, with its row of `stats`, or as another file."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in suffixes:
        status = entry.stat()
        folder.images.append(entry.name)
        stats.append((status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino))
        return
    folder.other_files[suffix or "no suffix"] += 1
    if suffix in TABLE_SUFFIXES:
        folder.tables.append(entry.name)


def _kind(entry):
    """ "folder", "file", or what else an entry of a folder is."""
    try:
        entry.name.encode()
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except UnicodeEncodeError:
        return "name that is not UTF-8"
    except OSError:  # a link to itself
        pass
    return "broken link" if entry.is_symlink() else "special file"


@dataclass
class Images:
    """Images of one split. Image i is at `paths[i]`, relative to the root, of class `labels[i]`."""

    paths: list[str]
    stats: np.ndarray  # int64 (n, 4), see Folder
    labels: list | None  # names of classes, or whole numbers; None without labels
    columns: dict[str, list] = field(default_factory=dict)  # further columns of a table

    def __len__(self):
        return len(self.paths)

    @staticmethod
    def directly_in(folder) -> Images:
        """The images in a folder, without labels and without those in its folders."""
        start = f"{folder.path}/" if folder.path else ""
        return Images([start + name for name in folder.images], folder.stats, None)

    @staticmethod
    def of(folder, label=None) -> Images:
        """All images in a folder and below, with one label or without labels."""
        images = Images.joined(Images.directly_in(child) for child in folder.walk())
        images.labels = None if label is None else [class_key(label)] * len(images)
        return images

    @staticmethod
    def joined(lists) -> Images:
        """One Images of several, without their further columns."""
        lists = list(lists)
        stats = [images.stats for images in lists]
        labels = [label for images in lists for label in images.labels or ()]
        return Images(
            [path for images in lists for path in images.paths],
            np.concatenate(stats) if stats else np.zeros((0, 4), np.int64),
            labels or None,
        )

    def select(self, mask) -> Images:
        """The images for which `mask`, bool (n,), is true."""
        chosen = np.flatnonzero(mask)
        labels = None if self.labels is None else [self.labels[k] for k in chosen]
        columns = {name: [values[k] for k in chosen] for name, values in self.columns.items()}
        return Images([self.paths[k] for k in chosen], self.stats[chosen], labels, columns)


@dataclass
class Listing:
    """What is used of a folder of images, as splits with classes, and what is left out."""

    splits: dict[str, Images]
    inside: str = "class folders"  # the folders that hold the images of the splits, for messages
    labels_from: str = "from class folders"  # for the plan
    has_splits: bool = False  # whether folders say which split an image is of
    unlabelled: Counter = field(default_factory=Counter)  # folder -> number of images
    reported: list[str] = field(default_factory=list)  # images that left_out counts already
    left_out: list[str] = field(default_factory=list)  # lines for the plan
    notes: list[str] = field(default_factory=list)  # for the plan

    def leave_unlabelled(self, paths):
        """Count these images as unlabelled."""
        folders = {path.rpartition("/")[0] for path in paths}
        self.unlabelled[os.path.commonpath(folders) if folders else ""] += len(paths)
        self.reported += paths


def count_left_out(listing, tree, root, tables=()):
    """Add to listing.left_out all that lies below the root and is not used, with the reason.

    tables: paths of the tables that were read. Raises UserError where more images are outside of
    the class folders than inside.
    """
    counted_paths = set(listing.reported)
    for images in listing.splits.values():
        counted_paths.update(images.paths)
    num_inside = sum(map(len, listing.splits.values()))
    loose = [path for path in Images.of(tree).paths if path not in counted_paths]
    if len(loose) > num_inside and listing.inside == "class folders":
        raise UserError(
            f"{root} has {num_inside:,} images in class folders and {len(loose):,} outside of "
            f"them ({few(loose)}): {EXPECTED}; --layout classes treats every folder as a class"
        )
    if loose:
        listing.left_out.append(
            f"{counted(len(loose), 'image')} outside of the {listing.inside}: {few(loose)}"
        )
    for path, number in listing.unlabelled.items():
        listing.left_out.append(
            f"{counted(number, 'image')} of {path or '.'}/, which are unlabelled: they can be "
            "predicted, not trained on"
        )
    other_files = sum((folder.other_files for folder in tree.walk()), Counter())
    base = os.path.abspath(root)
    for table in {os.path.abspath(table) for table in tables}:
        if table.startswith(f"{base}/"):
            other_files[os.path.splitext(table)[1].lower()] -= 1
    listing.left_out += by_suffix(+other_files)
    skipped: dict[str, list[str]] = {}
    for folder in tree.walk():
        for kind, paths in folder.skipped.items():
            skipped.setdefault(kind, []).extend(paths)
    for kind, paths in sorted(skipped.items()):
        listing.left_out.append(f"{counted(len(paths), kind)}: {few(paths)}")


def by_suffix(other_files):
    """A line such as "60 .heic: pip install pillow-heif" for each suffix of other files."""
    return [
        f"{number:,} {suffix}: {why_left_out(suffix) or 'not images'}"
        for suffix, number in sorted(other_files.items())
    ]


def remove_repeated(listing):
    """Leave out images that links reach twice; UserError for one in two classes or splits."""
    stats = np.concatenate([images.stats for images in listing.splits.values()])
    if not stats[:, 3].any():  # a file system without such numbers
        return
    _, firsts, files = np.unique(stats[:, 2:], axis=0, return_index=True, return_inverse=True)
    originals = firsts[files.reshape(-1)]  # of each image: the first image of the same file
    repeats = np.flatnonzero(originals != np.arange(len(originals)))
    names, splits = list(listing.splits), list(listing.splits.values())
    starts = np.cumsum([0, *map(len, splits)])
    split_of = np.repeat(np.arange(len(splits)), [len(images) for images in splits])

    def value(k, column):
        return getattr(splits[split_of[k]], column)[k - starts[split_of[k]]]

    across = repeats[split_of[repeats] != split_of[originals[repeats]]]
    if len(across):
        k, original = across[0], originals[across[0]]
        raise UserError(
            f"{counted(len(across), 'image')} of split '{names[split_of[k]]}' "
            f"{'is' if len(across) == 1 else 'are'} in split '{names[split_of[original]]}' too: "
            f"{value(k, 'paths')} and {value(original, 'paths')} are the same file"
        )
    for k in repeats:
        if value(k, "labels") != value(originals[k], "labels"):
            raise UserError(
                f"{value(originals[k], 'paths')} and {value(k, 'paths')} are the same file, of two "
                f"classes in split '{names[split_of[k]]}'"
            )
    for k, (name, images) in enumerate(zip(names, splits, strict=True)):
        twice = repeats[split_of[repeats] == k] - starts[k]
        if len(twice):
            listing.splits[name] = images.select(~np.isin(np.arange(len(images)), twice))
            listing.left_out.append(
                f"{counted(len(twice), 'image')} of {name} that links reach twice"
            )


def few(names, limit=3):
    """The first names, and how many more there are: "a, b, c and 2 more"."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def counted(number, noun):
    """A number and a noun: "1 image", "1,200 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def class_key(name) -> str:
    """The name of a class in one Unicode form, so that a name typed on two systems is one class."""
    return unicodedata.normalize("NFC", name)


def search_path(regex, path):
    """The match of a compiled pattern in a relative path, or in the path with a slash in front.

    The slash makes '/(cat|dog)[.]' match cat.0.jpg as well as train/cat.0.jpg.
    """
    return regex.search(class_key(path)) or regex.search(f"/{class_key(path)}")


def find_files(paths, flag="") -> list[Path]:
    """The files of `paths`: files, the images in folders, and what patterns match.

    They come in this order, each once. flag: the flag that has the paths, for messages. Raises
    UserError for a path without files.
    """
    files = []
    for path in paths:
        expanded = Path(path).expanduser()
        if expanded.is_dir():
            inside = sorted(expanded / path for path in Images.of(scan(expanded)).paths)
            if not inside:
                raise UserError(f"{flag}{path}: no images in this folder")
            files += inside
        elif expanded.exists():
            files.append(expanded)
        elif re.search(r"[*?\[]", path):
            matched = sorted(Path(file) for file in glob.glob(str(expanded), recursive=True))
            if not matched:
                raise UserError(f"{flag}{path}: no file matches")
            files += matched
        else:
            raise UserError(f"{flag}{path}: no such file or folder")
    return list(dict.fromkeys(files))

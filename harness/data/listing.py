"""The tree of a folder of images, and what was taken of it: splits, classes, what was left out."""

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

IGNORED = {  # and all that begins with a dot
    "__macosx", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found",
    "system volume information",
}  # fmt: skip
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
EXPECTED = "expected CLASS/*.jpg or train/CLASS/*.jpg"


@dataclass
class Folder:
    """A folder and what is in it, hidden things left out."""

    name: str
    path: str  # relative to the root, with /; "" for the root
    folders: list[Folder] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # names
    stats: np.ndarray | None = None  # int64 (images, 4): size, time in ns, device, inode
    tables: list[str] = field(default_factory=list)  # names of files that may be tables of labels
    others: Counter = field(default_factory=Counter)  # files that are no images, by suffix
    skipped: dict[str, list[str]] = field(default_factory=dict)  # what it is -> paths
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
        return f"{self.path or '.'}/"


def hidden(name) -> bool:
    """Whether a file or folder of this name is passed by."""
    return name.startswith(".") or name.lower() in IGNORED


def scan(root) -> Folder:
    """All below `root`, links followed. Raises UserError for a link that leads in a circle."""
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
    for folder in reversed(order):  # those below come after those above
        folder.total = len(folder.images) + sum(child.total for child in folder.folders)
    return top


def _identity(status):
    """What is the same for all links to a folder; None where the file system has no such number."""
    return (status.st_dev, status.st_ino) if status.st_ino else None


def _add_file(folder, entry, suffixes, stats):
    """Note a file as an image, with its numbers in `stats`, or as something else."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in suffixes:
        status = entry.stat()
        folder.images.append(entry.name)
        stats.append((status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino))
        return
    folder.others[suffix or "no suffix"] += 1
    if suffix in TABLE_SUFFIXES:
        folder.tables.append(entry.name)


def _kind(entry):
    """ "folder", "file", or what it is instead."""
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
    """Images of one split. Image i is `paths[i]`, relative to the root, of class `labels[i]`."""

    paths: list[str]
    stats: np.ndarray  # int64 (n, 4), see Folder
    labels: list | None  # names of classes, or whole numbers; None where none are known
    others: dict[str, list] = field(default_factory=dict)  # further columns of a table

    def __len__(self):
        return len(self.paths)

    @staticmethod
    def directly_in(folder) -> Images:
        """The images in a folder, not those below, without labels."""
        start = f"{folder.path}/" if folder.path else ""
        return Images([start + name for name in folder.images], folder.stats, None)

    @staticmethod
    def of(folder, label=None) -> Images:
        """All images below a folder, of one class or of none."""
        images = Images.joined(Images.directly_in(each) for each in folder.walk())
        images.labels = None if label is None else [class_key(label)] * len(images)
        return images

    @staticmethod
    def joined(parts) -> Images:
        parts = list(parts)
        stats = [part.stats for part in parts]
        labels = [label for part in parts for label in part.labels or ()]
        return Images(
            [path for part in parts for path in part.paths],
            np.concatenate(stats) if stats else np.zeros((0, 4), np.int64),
            labels or None,
        )

    def where(self, keep) -> Images:
        """The images at the places where `keep`, booleans, is true."""
        chosen = np.flatnonzero(keep)
        labels = None if self.labels is None else [self.labels[k] for k in chosen]
        others = {name: [values[k] for k in chosen] for name, values in self.others.items()}
        return Images([self.paths[k] for k in chosen], self.stats[chosen], labels, others)


@dataclass
class Listing:
    """What a folder of images is: its splits with their classes, and what was not taken."""

    splits: dict[str, Images]
    inside: str = "class folders"  # what the images of the splits are in
    labels_from: str = "from class folders"  # for the plan
    has_splits: bool = False  # whether folders say which split an image is of
    unlabelled: Counter = field(default_factory=Counter)  # folder -> how many images
    reported: list[str] = field(default_factory=list)  # images that left_out counts already
    left_out: list[str] = field(default_factory=list)  # in words
    notes: list[str] = field(default_factory=list)  # for the plan

    def leave_unlabelled(self, paths):
        """These images have no label."""
        folders = {path.rpartition("/")[0] for path in paths}
        self.unlabelled[os.path.commonpath(folders) if folders else ""] += len(paths)
        self.reported += paths


def count_left_out(listing, tree, root, tables=()):
    """Add to listing.left_out all that lies below the root and was not taken, with the reason.

    tables: paths of the tables that were read. Raises UserError where more images are outside of
    the classes than inside.
    """
    known = set(listing.reported)
    for images in listing.splits.values():
        known.update(images.paths)
    taken = sum(map(len, listing.splits.values()))
    loose = [path for path in Images.of(tree).paths if path not in known]
    if len(loose) > taken and listing.inside == "class folders":
        raise UserError(
            f"{root} has {taken:,} images in class folders and {len(loose):,} outside of "
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
    others = sum((folder.others for folder in tree.walk()), Counter())
    here = os.path.abspath(root)
    for table in {os.path.abspath(table) for table in tables}:
        if table.startswith(f"{here}/"):
            others[os.path.splitext(table)[1].lower()] -= 1
    listing.left_out += by_suffix(+others)
    skipped: dict[str, list[str]] = {}
    for folder in tree.walk():
        for kind, paths in folder.skipped.items():
            skipped.setdefault(kind, []).extend(paths)
    for kind, paths in sorted(skipped.items()):
        listing.left_out.append(f"{counted(len(paths), kind)}: {few(paths)}")


def by_suffix(others):
    """ "60 .heic: pip install pillow-heif" for each kind of file that is no image."""
    words = []
    for suffix, number in sorted(others.items()):
        why = why_left_out(suffix)
        words.append(f"{number:,} {suffix}: {why or 'not images'}")
    return words


def remove_repeated(listing):
    """Leave out images that links reach a second time; UserError if in another class or split."""
    stats = np.concatenate([images.stats for images in listing.splits.values()])
    if not stats[:, 3].any():  # a file system without such numbers
        return
    _, first, place = np.unique(stats[:, 2:], axis=0, return_index=True, return_inverse=True)
    first = first[place.reshape(-1)]
    again = np.flatnonzero(first != np.arange(len(first)))
    names, parts = list(listing.splits), list(listing.splits.values())
    starts = np.cumsum([0, *map(len, parts)])
    part = np.repeat(np.arange(len(parts)), [len(images) for images in parts])

    def of(k, column):
        return getattr(parts[part[k]], column)[k - starts[part[k]]]

    across = again[part[again] != part[first[again]]]
    if len(across):
        k, same = across[0], first[across[0]]
        raise UserError(
            f"{counted(len(across), 'image')} of split '{names[part[k]]}' "
            f"{'is' if len(across) == 1 else 'are'} in split '{names[part[same]]}' too: "
            f"{of(k, 'paths')} and {of(same, 'paths')} are the same file"
        )
    for k in again:
        if of(k, "labels") != of(first[k], "labels"):
            raise UserError(
                f"{of(first[k], 'paths')} and {of(k, 'paths')} are the same file, of two classes "
                f"in split '{names[part[k]]}'"
            )
    for k, (name, images) in enumerate(zip(names, parts, strict=True)):
        twice = again[part[again] == k] - starts[k]
        if len(twice):
            listing.splits[name] = images.where(~np.isin(np.arange(len(images)), twice))
            listing.left_out.append(
                f"{counted(len(twice), 'image')} of {name} that links reach twice"
            )


def few(names, most=3):
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def counted(number, noun):
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def class_key(name) -> str:
    """A class's name in one Unicode form, so that a name typed on two systems is one class."""
    return unicodedata.normalize("NFC", name)


def search_path(regex, path):
    """The match of a compiled pattern in a relative path, or in it with a slash in front.

    So that '/(cat|dog)[.]' fits train/cat.0.jpg, and cat.0.jpg too.
    """
    return regex.search(class_key(path)) or regex.search(f"/{class_key(path)}")


def find_files(paths, flag="") -> list[Path]:
    """Files, the images in folders, and what patterns match, in order and once each.

    flag: where they were given, for messages. Raises UserError for what is not there.
    """
    files = []
    for path in paths:
        place = Path(path).expanduser()
        if place.is_dir():
            inside = sorted(place / path for path in Images.of(scan(place)).paths)
            if not inside:
                raise UserError(f"{flag}{path}: no images in this folder")
            files += inside
        elif place.exists():
            files.append(place)
        elif re.search(r"[*?\[]", path):
            matched = sorted(Path(file) for file in glob.glob(str(place), recursive=True))
            if not matched:
                raise UserError(f"{flag}{path}: no file matches")
            files += matched
        else:
            raise UserError(f"{flag}{path}: no such file or folder")
    return list(dict.fromkeys(files))

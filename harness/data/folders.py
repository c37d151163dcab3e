"""Image folders: which file is an image of which class in which split, by the tree alone.

The class is the first folder under the split, as in torchvision's ImageFolder, whatever lies
deeper. File names decide nothing. What is left out is counted and named; what is ambiguous is
refused. `read_folder` has the rules in their order.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from harness.data.formats import image_suffixes, why_left_out
from harness.errors import UserError

# A word of a folder's name -> the split that it is
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
UNLABELLED = re.compile(
    r"(test|testing|val|valid|validation|eval|evaluation|unlabell?ed|inference)\d*"
)
PASSED_BY = {"__macosx", "thumbs.db", "desktop.ini"}  # and all that begins with a dot
EXPECTED = "expected CLASS/*.jpg or train/CLASS/*.jpg"


@dataclass
class Folder:
    """A folder and what is in it, hidden things left out."""

    name: str
    path: str  # relative to the root, with /; "" for the root
    folders: list[Folder] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # names
    facts: np.ndarray | None = None  # int64 (images, 4): size, time in ns, device, inode
    others: Counter = field(default_factory=Counter)  # files that are no images, by suffix
    total: int = 0  # images in it and below

    def walk(self):
        """This folder and all below it."""
        todo = [self]
        while todo:
            folder = todo.pop()
            yield folder
            todo += reversed(folder.folders)

    def inhabited(self) -> list[Folder]:
        """Its folders with an image in them or below."""
        return [folder for folder in self.folders if folder.total]

    def below(self, *names) -> Folder | None:
        """The folder at these names under it, or None."""
        found = self
        for name in names:
            found = next((f for f in found.folders if f.name == name), None)
            if found is None:
                return None
        return found

    def shown(self) -> str:
        return f"{self.path or '.'}/"


def hidden(name) -> bool:
    """Whether a file or folder of this name is passed by."""
    return name.startswith(".") or name.lower() in PASSED_BY


def scan(root) -> Folder:
    """All below `root`, links followed. Raises UserError for a link that leads in a circle."""
    suffixes = image_suffixes()
    top = Folder("", "")
    here = os.stat(root)
    todo = [(top, os.fspath(root), ((here.st_dev, here.st_ino),))]
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
            facts, inside = [], []
            for entry in entries:
                name = entry.name
                if hidden(name):
                    continue
                if not _is_text(name):
                    folder.others["a name that is not UTF-8"] += 1
                elif entry.is_dir():
                    child = Folder(name, f"{folder.path}/{name}" if folder.path else name)
                    folder.folders.append(child)
                    status = entry.stat()
                    key = (status.st_dev, status.st_ino) if status.st_ino else entry.path
                    if key in above:
                        raise UserError(f"{entry.path} is a link to a folder that it lies in")
                    inside.append((child, entry.path, (*above, key)))
                elif not entry.is_file():
                    folder.others["links that lead nowhere"] += 1
                elif (suffix := os.path.splitext(name)[1].lower()) in suffixes:
                    status = entry.stat()
                    folder.images.append(name)
                    facts.append((status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino))
                else:
                    folder.others[suffix or "no suffix"] += 1
            folder.facts = np.array(facts, np.int64).reshape(-1, 4)
            bar.update(len(entries))
            todo += reversed(inside)
    for folder in reversed(order):  # those below come after those above
        folder.total = len(folder.images) + sum(child.total for child in folder.folders)
    return top


def _is_text(name):
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class Images:
    """Images of one split. Image i is `paths[i]`, relative to the root, of class `labels[i]`."""

    paths: list[str]
    facts: np.ndarray  # int64 (n, 4), see Folder
    labels: list | None  # names of classes, or whole numbers; None where none are known
    others: dict[str, list] = field(default_factory=dict)  # further columns of a table

    def __len__(self):
        return len(self.paths)

    @staticmethod
    def of(folder, label=None) -> Images:
        """All images below a folder, of one class or of none."""
        paths, facts = [], []
        for each in folder.walk():
            paths += [f"{each.path}/{name}" if each.path else name for name in each.images]
            facts.append(each.facts)
        return Images(paths, np.concatenate(facts), None if label is None else [label] * len(paths))

    @staticmethod
    def joined(parts) -> Images:
        parts = list(parts)
        facts = [part.facts for part in parts]
        return Images(
            [path for part in parts for path in part.paths],
            np.concatenate(facts) if facts else np.zeros((0, 4), np.int64),
            [label for part in parts for label in part.labels],
        )

    def where(self, keep) -> Images:
        """The images at the places where `keep`, booleans, is true."""
        chosen = np.flatnonzero(keep)
        labels = None if self.labels is None else [self.labels[k] for k in chosen]
        others = {name: [values[k] for k in chosen] for name, values in self.others.items()}
        return Images([self.paths[k] for k in chosen], self.facts[chosen], labels, others)


@dataclass
class Listing:
    """What a folder of images is: its splits with their classes, and what was not taken."""

    splits: dict[str, Images]
    unlabelled: dict[str, int] = field(default_factory=dict)  # folder -> how many images
    strays: list[str] = field(default_factory=list)  # images of a split whose class isn't known
    left_out: list[str] = field(default_factory=list)  # in words
    notes: list[str] = field(default_factory=list)  # for the plan


# -- the layout ----------------------------------------------------------------------------------


def split_of(name) -> str | None:
    """The split that a folder's name says, or None; raises UserError where it says two.

    >>> split_of("seg_train"), split_of("test1"), split_of("TrainingSet"), split_of("contest")
    ('train', 'test', 'train', None)
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    splits = {SPLIT_WORDS[word.lower()] for word in words if word.lower() in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def read_folder(root, tree, layout="auto") -> Listing:
    """The splits and classes of a tree of images. Raises UserError where it can't be told.

    In this order, each at the root or wrapped in one folder:
    1. folders with a split's name that hold class folders, train among them: TRAIN/CLASS;
    2. every folder holds such folders with images directly inside: CLASS/TRAIN;
    3. several folders that are data sets of their own: refused;
    4. folders are classes, unless all have a split's name, which is refused; a flat test folder
       beside them is unlabelled.
    layout: "classes", every folder is a class; "splits", every folder with a split's name is a
    split; or "auto".
    """
    top = _unwrapped(tree, layout)
    if not top.inhabited():
        raise UserError(_no_classes(root, tree))
    if layout == "classes":
        listing = _classes(top, everything=True)
    else:
        splits = _split_folders(top)
        swapped = layout == "auto" and not splits and _swapped(top)
        if splits:
            listing = _under_splits(top, splits)
        elif layout == "splits":
            raise UserError(f"--layout splits: {root} has no train folder that holds class folders")
        elif swapped:
            listing = _under_classes(top)
        else:
            _refuse_several(root, top)
            listing = _classes(top, root=root)
    account(listing, tree, root)
    return listing


def _unwrapped(tree, layout):
    """The folder that the splits or classes are in: the root, or its only folder with images."""
    inside = tree.inhabited()
    if len(inside) != 1 or tree.images or (layout == "classes" and inside[0].images):
        return tree
    (only,) = inside
    if only.images or (split_of(only.name) and layout != "classes"):
        return tree
    return only


def _split_folders(top) -> dict[str, Folder]:
    """{split: folder} of the folders that have a split's name and hold class folders."""
    found = {}
    for folder in top.inhabited():
        split = split_of(folder.name)
        if split and folder.inhabited():
            if split in found:
                names = " and ".join(f.shown() for f in (found[split], folder))
                raise UserError(f"{names} are both the split '{split}': keep one of them")
            found[split] = folder
    order = [split for split in ("train", "validation", "test") if split in found]
    return {split: found[split] for split in order} if "train" in found else {}


def _under_splits(top, splits):
    listing = Listing({})
    for folder in top.inhabited():
        flat = not folder.inhabited()
        if flat and (split_of(folder.name) or UNLABELLED.fullmatch(folder.name.lower())):
            listing.unlabelled[folder.path] = folder.total
    for split, folder in splits.items():
        classes = folder.inhabited()
        listing.splits[split] = Images.joined(Images.of(c, c.name) for c in classes)
    return listing


def _parts(folder) -> dict[str, Folder]:
    """{split: folder} of the folders in it that have a split's name and images directly inside."""
    found = {}
    for child in folder.folders:
        split = split_of(child.name)
        if split and child.images:
            if split in found:
                names = " and ".join(f.shown() for f in (found[split], child))
                raise UserError(f"{names} are both the split '{split}': keep one of them")
            found[split] = child
    return found


def _swapped(top) -> bool:
    """Whether the folders are classes that hold the splits; raises UserError if only some do."""
    parts = {folder.name: _parts(folder) for folder in top.inhabited()}
    with_splits = [name for name, found in parts.items() if "train" in found]
    if not with_splits:
        return False
    without = [name for name in parts if name not in with_splits]
    if without:
        raise UserError(
            f"{with_splits[0]}/ holds the folder of a train split, but {few(without)} "
            f"{'does' if len(without) == 1 else 'do'} not: --layout classes takes every folder for "
            "a class"
        )
    return True


def _under_classes(top):
    listing = Listing({})
    parts = {folder.name: _parts(folder) for folder in top.inhabited()}
    for split in ("train", "validation", "test"):
        found = [(name, of[split]) for name, of in parts.items() if split in of]
        if found:
            listing.splits[split] = Images.joined(Images.of(f, name) for name, f in found)
    listing.notes.append("the splits lie in the class folders: CLASS/train")
    return listing


def _refuse_several(root, top):
    """Raise UserError for a folder of several data sets, each with splits and classes."""
    found = [f.name for f in top.inhabited() if not split_of(f.name) and _has_train(f)]
    if found:
        raise UserError(
            f"{root} holds {counted(len(found), 'data set')} with splits of their own, "
            f"{few(found)}: give one of them as --dataset ({EXPECTED})"
        )


def _has_train(folder):
    return any(split_of(f.name) == "train" and f.inhabited() for f in folder.inhabited())


def _classes(top, everything=False, root=None):
    """Every folder is a class, but for unlabelled ones beside them."""
    folders = top.inhabited()
    listing = Listing({})
    if not everything:
        named = [f for f in folders if split_of(f.name)]
        with_classes = [f for f in named if f.inhabited()]
        if with_classes:
            raise UserError(
                f"{with_classes[0].shown()} holds class folders, but there is no train/ that does: "
                f"{EXPECTED} (--layout classes takes every folder for a class)"
            )
        if len(named) == len(folders):
            raise UserError(
                f"{root} has {few([f.name + '/' for f in folders])} without class folders inside, "
                f"and no table of labels: {EXPECTED}. Where file names hold the class, "
                "--label_pattern REGEX reads it from them; where a table does, --labels FILE"
            )
        for folder in folders:
            if UNLABELLED.fullmatch(folder.name.lower()) and not folder.inhabited():
                listing.unlabelled[folder.path] = folder.total
        folders = [f for f in folders if f.path not in listing.unlabelled]
        odd = [f.name for f in folders if split_of(f.name)]
        if odd:
            listing.notes.append(
                f"{few(odd)} {'is a class' if len(odd) == 1 else 'are classes'} here, not "
                f"{'a split' if len(odd) == 1 else 'splits'}"
            )
    listing.splits["train"] = Images.joined(Images.of(f, f.name) for f in folders)
    parents = [f for f in folders if not f.images]
    if parents:
        listing.notes.append(
            f"{few([f.name for f in parents])}: no image directly inside, so what lies below is "
            "one class; a data set of its own is given by itself"
        )
    return listing


def _no_classes(root, tree):
    if not tree.images:
        others = sum((folder.others for folder in tree.walk()), Counter())
        found = ", ".join(by_suffix(others)) or "nothing"
        return f"{root} has no images: {EXPECTED}, found {found}"
    return (
        f"{root} has {counted(len(tree.images), 'image')} directly inside and no class folders: "
        f"{EXPECTED}, found {tree.images[0]}. If it is the folder of one class, give the folder "
        "that it is in; where file names hold the class, --label_pattern REGEX reads it from "
        "them; where a table does, --labels FILE"
    )


# -- what the file names say ---------------------------------------------------------------------


def read_pattern(root, tree, pattern) -> Listing:
    """Splits by folders, classes by `pattern` in the path of each image relative to the root."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--label_pattern {pattern}: {error}") from None
    if regex.groups != 1:
        raise UserError(
            f"--label_pattern {pattern} has {regex.groups} groups: the class is what its one group "
            "matches, as in '/(cat|dog)[.]'"
        )
    listing, example = Listing({}), None
    for split, folder in splits_of(tree).items():
        images = Images.of(folder)
        found = [regex.search(path) for path in images.paths]
        labels = [match[1] if match else None for match in found]
        matched = np.array([bool(label) for label in labels])
        example = example or (images.paths[0] if images.paths else None)
        if not matched.any():
            listing.unlabelled[folder.path] = len(images)
            continue
        images.labels = labels
        strays = [images.paths[k] for k in np.flatnonzero(~matched)]
        if len(strays) > len(images) / 2:
            raise UserError(
                f"--label_pattern {pattern} matches {matched.sum():,} of {len(images):,} images of "
                f"split '{split}', under half; not {few(strays)}"
            )
        if strays:
            listing.strays += strays
            listing.left_out.append(
                f"{len(strays):,} of {split} that --label_pattern does not match: {few(strays)}"
            )
        listing.splits[split] = images.where(matched)
    if "train" not in listing.splits:
        raise UserError(f"--label_pattern {pattern} matches no image of train, as {example}")
    account(listing, tree, root)
    return listing


def splits_of(tree) -> dict[str, Folder]:
    """{split: folder} of the folders with a split's name and images; {"train": tree} for none."""
    for top in (tree, *tree.inhabited()[: len(tree.inhabited()) == 1]):
        found = {}
        for folder in top.inhabited():
            split = split_of(folder.name)
            if split and split in found:
                names = " and ".join(f.shown() for f in (found[split], folder))
                raise UserError(f"{names} are both the split '{split}': keep one of them")
            if split:
                found[split] = folder
        if "train" in found:
            return found
    return {"train": tree}


# -- accounts ------------------------------------------------------------------------------------


def account(listing, tree, root):
    """Count what was left out, and check that one image is not in several places."""
    known = set(listing.strays)
    for images in listing.splits.values():
        known.update(images.paths)
    _once(listing)
    taken = sum(map(len, listing.splits.values()))
    loose = []
    for folder in tree.walk():
        inside = any(
            folder.path == path or folder.path.startswith(f"{path}/") for path in listing.unlabelled
        )
        if not inside:
            paths = [f"{folder.path}/{n}" if folder.path else n for n in folder.images]
            loose += [path for path in paths if path not in known]
    if len(loose) > taken:
        raise UserError(
            f"{root} has {taken:,} images in class folders and {len(loose):,} outside of "
            f"them ({few(loose)}): {EXPECTED}"
        )
    if loose:
        listing.left_out.append(
            f"{counted(len(loose), 'image')} outside of the class folders: {few(loose)}"
        )
    for path, number in listing.unlabelled.items():
        listing.left_out.append(
            f"{counted(number, 'image')} of {path or '.'}/, which are unlabelled: they can be "
            "predicted, not trained on"
        )
    others = sum((folder.others for folder in tree.walk()), Counter())
    listing.left_out += by_suffix(others)


def by_suffix(others):
    """ "60 .heic: pip install pillow-heif" for each kind of file that is no image."""
    words = []
    for suffix, number in sorted(others.items()):
        why = why_left_out(suffix)
        words.append(f"{number:,} {suffix}: {why or 'not images'}")
    return words


def _once(listing):
    """Leave out images that links reach a second time; UserError if in another class or split."""
    facts = np.concatenate([images.facts for images in listing.splits.values()])
    if not facts[:, 3].any():  # a file system without such numbers
        return
    _, first, place = np.unique(facts[:, 2:], axis=0, return_index=True, return_inverse=True)
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

"""Image folders: which file is an image of which class in which split, by the tree alone.

The class is the first folder under the split, as in torchvision's ImageFolder, whatever lies
deeper. File names decide nothing. What is left out is counted and named; what is ambiguous is
refused. `read_folder` has the rules in their order.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from harness.data.listing import (
    EXPECTED,
    Folder,
    Images,
    Listing,
    by_suffix,
    class_key,
    counted,
    few,
    search_path,
)
from harness.errors import UserError

# A word of a folder's name -> the split that it is
SPLIT_WORDS = {
    "train": "train", "training": "train", "trainset": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "valset": "validation", "testset": "test",
}  # fmt: skip
UNLABELLED = re.compile(
    r"(test|testing|val|valid|validation|eval|evaluation|unlabell?ed|inference)\d*"
)
# Folders that rather hold all images, or what belongs to them, than those of one class
GENERIC = {
    "image", "images", "img", "imgs", "jpegimages", "photo", "photos", "picture", "pictures",
    "pics", "data", "dataset", "files", "mask", "masks", "annotation", "annotations", "label",
    "labels", "segmentation", "segmentations", "trimaps", "examples", "samples",
}  # fmt: skip
# What cameras, phones and programs call every file, in lower case: IMG_0001.jpg
CAMERA_WORDS = {
    "img", "image", "images", "imgp", "cimg", "mvimg", "dsc", "dscn", "dscf", "pxl", "dji", "gopr",
    "pano", "photo", "foto", "pic", "picture", "screenshot", "whatsapp", "snapchat", "unnamed",
    "untitled",
}  # fmt: skip
STRICTLY_SPLIT = re.compile(rf"({'|'.join(SPLIT_WORDS)})\d*")


def split_of(name) -> str | None:
    """The split that a folder's name says; None where it says none or two.

    >>> split_of("seg_train"), split_of("test1"), split_of("TrainingSet"), split_of("contest")
    ('train', 'test', 'train', None)
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    splits = {SPLIT_WORDS[word.lower()] for word in words if word.lower() in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def by_split(folders) -> dict[str, Folder]:
    """{split: folder} of those with a split's name; raises UserError for two of one split."""
    found: dict[str, Folder] = {}
    for folder in folders:
        split = split_of(folder.name)
        if split in found:
            raise UserError(
                f"{found[split].shown()} and {folder.shown()} are both the split '{split}': keep "
                "one of them"
            )
        if split:
            found[split] = folder
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


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
    if not top.with_images():
        raise UserError(_no_classes(root, tree))
    if layout == "classes":
        listing = _as_classes(top, top.with_images())
    elif splits := _split_folders(top):
        listing = _under_splits(top, splits)
    elif layout == "splits":
        raise UserError(f"--layout splits: {root} has no train folder that holds class folders")
    elif parts := _splits_of_classes(top):
        listing = _under_classes(parts)
    else:
        _refuse_several(root, top)
        listing = _class_folders(root, top)
    return listing


def _unwrapped(tree, layout):
    """The folder that the splits or classes are in: the root, or its only folder with images."""
    inside = tree.with_images()
    if len(inside) != 1 or tree.images or (layout == "classes" and inside[0].images):
        return tree
    (only,) = inside
    if only.images or (split_of(only.name) and layout != "classes"):
        return tree
    return only


def _split_folders(top) -> dict[str, Folder]:
    """{split: folder} of the folders with a split's name that hold class folders, if train is one.

    seg_train/seg_train/CLASS is as seg_train/CLASS.
    """
    found = by_split(folder for folder in top.with_images() if folder.with_images())
    for split, folder in found.items():
        inside = folder.with_images()
        again = len(inside) == 1 and not folder.images and split_of(inside[0].name) == split
        if again and inside[0].with_images():
            found[split] = inside[0]
    return found if "train" in found else {}


def _under_splits(top, splits):
    listing = Listing({}, has_splits=True)
    for folder in top.with_images():
        flat = not folder.with_images()
        if flat and (split_of(folder.name) or UNLABELLED.fullmatch(folder.name.lower())):
            listing.leave_unlabelled(Images.of(folder).paths)
    of_train = {folder.name for folder in splits["train"].with_images()}
    for split, folder in splits.items():
        classes = folder.with_images()
        if split != "train" and len(classes) == 1 and _is_one_for_all(classes[0], of_train):
            listing.leave_unlabelled(Images.of(folder).paths)
            continue
        listing.splits[split] = Images.joined(Images.of(c, c.name) for c in classes)
        _tell_odd_classes(listing, folder, classes)
    return listing


def _is_one_for_all(folder, classes=()):
    """Whether the only folder of a split holds its images of all classes: test/images/*.jpg."""
    name = folder.name.lower()
    return folder.name not in classes and bool(name in GENERIC or split_of(name))


def labelled_splits(tree) -> dict[str, Images]:
    """{split: images} of the folders with a split's name that hold class folders."""
    for top in tops(tree):
        found = {}
        for split, folder in by_split(top.with_images()).items():
            classes = folder.with_images()
            if len(classes) > 1 or (classes and not _is_one_for_all(classes[0])):
                found[split] = Images.joined(Images.of(c, c.name) for c in classes)
        if found:
            return found
    return {}


def _splits_of_classes(top) -> dict[str, dict[str, Folder]]:
    """{class: {split: folder}} where the classes hold the splits; UserError if only some do."""
    parts = {
        folder.name: by_split(child for child in folder.folders if child.images)
        for folder in top.with_images()
    }
    having = [name for name, found in parts.items() if "train" in found]
    without = [name for name in parts if name not in having]
    if having and without:
        raise UserError(
            f"{having[0]}/ holds the folder of a train split, but {few(without)} "
            f"{'does' if len(without) == 1 else 'do'} not: --layout classes treats every folder as "
            "a class"
        )
    return parts if having else {}


def _under_classes(parts):
    listing = Listing({}, has_splits=True)
    listing.notes.append("the splits lie in the class folders: CLASS/train")
    for split in ("train", "validation", "test"):
        found = [Images.of(of[split], name) for name, of in parts.items() if split in of]
        if found:
            listing.splits[split] = Images.joined(found)
    return listing


def _refuse_several(root, top):
    """Raise UserError for a folder of several data sets, each with splits and classes."""
    found = [f.name for f in top.with_images() if not split_of(f.name) and _has_train(f)]
    if found:
        raise UserError(
            f"{root} holds {counted(len(found), 'data set')} with splits of their own, "
            f"{few(found)}: give one of them as --dataset ({EXPECTED})"
        )


def _has_train(folder):
    return any(split_of(f.name) == "train" and f.with_images() for f in folder.with_images())


def _class_folders(root, top):
    """Every folder is a class, but for flat ones that are called as if they were unlabelled."""
    folders = top.with_images()
    named = [f for f in folders if split_of(f.name)]
    with_classes = [f for f in named if f.with_images()]
    if with_classes:
        raise UserError(
            f"{with_classes[0].shown()} holds class folders, but there is no train/ that does: "
            f"{EXPECTED} (--layout classes treats every folder as a class)"
        )
    unlabelled = [
        f for f in folders if UNLABELLED.fullmatch(f.name.lower()) and not f.with_images()
    ]
    if all(f in named or f in unlabelled for f in folders):
        raise UserError(
            f"{root} has {few([f.name + '/' for f in folders])} without class folders inside, and "
            f"no table of labels: {EXPECTED}. {other_ways(top)}"
        )
    classes = [f for f in folders if f not in unlabelled]
    listing = _as_classes(top, classes)
    for folder in unlabelled:
        listing.leave_unlabelled(Images.of(folder).paths)
    odd = [f.name for f in classes if split_of(f.name)]
    if odd:
        are = "is a class here, not a split" if len(odd) == 1 else "are classes here, not splits"
        listing.notes.append(f"{few(odd)} {are}")
    return listing


def _as_classes(top, folders):
    listing = Listing({"train": Images.joined(Images.of(f, f.name) for f in folders)})
    _tell_odd_classes(listing, top, folders)
    return listing


def _tell_odd_classes(listing, parent, classes):
    """Notes on classes that may be none, and on folders that may be classes."""
    parents = [f for f in classes if not f.images]
    if parents:
        listing.notes.append(
            f"warning: {few(f.shown() for f in parents)}: no image directly inside, so all that "
            "lies below is one class; if it is a data set with classes of its own, give that "
            "folder as --dataset"
        )
    generic = [f.shown() for f in classes if f.images and f.name.lower() in GENERIC]
    if generic:
        listing.notes.append(
            f"{few(generic)} {'is a class' if len(generic) == 1 else 'are classes'} here, as every "
            "folder is; where a table has the labels, --labels FILE"
        )
    empty = [f.shown() for f in parent.folders if not f.total]
    if empty:
        listing.notes.append(f"no image that can be read in {few(empty)}: not a class")


MOST_WORDS = 8  # that file names begin with, for a pattern that names them


def other_ways(tree):
    """What to do where folders do not say the classes, with the table that may."""
    top = [tree, *tree.folders]
    tables = [f"{f.path}/{name}".lstrip("/") for f in top for name in f.tables]
    there = f" ({'there is' if len(tables) == 1 else 'there are'} {few(tables)})" if tables else ""
    names = [name for folder in tree.walk() for name in folder.images]
    pattern = _pattern_of(names)
    example = f"'{pattern}' here{_alike(pattern)}" if pattern else "'/(cat|dog)[.]'"
    return (
        f"Where file names hold the class, --label_pattern reads it from them, as {example}; "
        f"where a table does, --labels FILE{there}"
    )


def _pattern_of(names):
    """A --label_pattern for file names that begin with few words, as cat.0.jpg; "" for others.

    What cameras call every file is no class: such files may be the smaller part of the others.
    """
    first = [match[0] for name in names if (match := re.match(r"[^\W\d_]+", name))]
    words = Counter(word for word in first if word.casefold() not in CAMERA_WORDS)
    if not 1 < len(words) <= MOST_WORDS or len(first) < len(names):
        return ""
    if words.total() < len(names) / 2:
        return ""
    if min(words.values()) < 2:
        return ""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return f"/({'|'.join(longest_first)})(?![^\\W\\d_])"


def _alike(pattern):
    """Which words of a suggested pattern differ in case alone, in words."""
    words = sorted(pattern[2:].partition(")")[0].split("|"))
    for k, word in enumerate(words):
        same = [other for other in words[k:] if other.casefold() == word.casefold()]
        if len(same) > 1:
            return (
                f" ({' and '.join(same)} are two classes by it: spell the files of one class alike)"
            )
    return ""


def _no_classes(root, tree):
    if not tree.images:
        others = sum((folder.others for folder in tree.walk()), Counter())
        found = ", ".join(by_suffix(others)) or "nothing"
        return f"{root} has no images: {EXPECTED}, found {found}"
    return (
        f"{root} has {counted(len(tree.images), 'image')} directly inside and no class folders: "
        f"{EXPECTED}, found {tree.images[0]}. If it is the folder of one class, give the folder "
        f"that it is in. {other_ways(tree)}"
    )


# -- what the file names say ---------------------------------------------------------------------


def read_pattern(root, tree, pattern) -> Listing:
    """Splits by folders, classes by `pattern` in the path of each image relative to the root."""
    try:
        regex = re.compile(class_key(pattern))
    except re.error as error:
        raise UserError(f"--label_pattern {pattern}: {error}") from None
    if regex.groups != 1:
        raise UserError(
            f"--label_pattern {pattern} has {regex.groups} groups: the class is what its one group "
            "matches, as in '/(cat|dog)[.]'; (?:…) groups without being one"
        )
    listing = Listing({}, "folders of the splits", f"from file names by {pattern}")
    splits = split_images(tree)
    for split, images in splits.items():
        found = [search_path(regex, path) for path in images.paths]
        labels = [match and match[1] and class_key(match[1]) for match in found]
        matched = np.array([bool(label) for label in labels])
        if not matched.any():
            listing.leave_unlabelled(images.paths)
            continue
        images.labels = labels
        without = [images.paths[k] for k in np.flatnonzero(~matched)]
        if len(without) > len(images) / 2:
            raise UserError(
                f"--label_pattern {pattern} matches {matched.sum():,} of {len(images):,} images of "
                f"split '{split}', under half; not {few(without)}"
            )
        if without:
            listing.reported += without
            listing.left_out.append(
                f"{len(without):,} of {split} that --label_pattern does not match: {few(without)}"
            )
        listing.splits[split] = images.where(matched)
    if "train" not in listing.splits:
        example = few(splits["train"].paths if "train" in splits else (), 1)
        raise UserError(
            f"--label_pattern {pattern} matches no train image's path under {root}: {example}"
        )
    return listing


def split_images(tree) -> dict[str, Images]:
    """{split: images} by the folders with a split's name, wherever they lie.

    Images in none of these are train where there is no train folder, else of no split.

    Of siblings with a train folder among them, all with a split's name are meant (seg_train,
    seg_test); elsewhere only what is called test, test1, val and so on, and nothing more.
    """
    parts: dict[str, list[Images]] = {}
    others = []
    todo = [tree]
    while todo:
        folder = todo.pop()
        of = {child.path: split_of(child.name) for child in folder.with_images()}
        if set(of.values()) == {"train", None}:
            of = {}  # a class called train among others
        others.append(Images.directly_in(folder))
        for child in reversed(folder.with_images()):
            split = of.get(child.path)
            if split and ("train" in of.values() or STRICTLY_SPLIT.fullmatch(child.name.lower())):
                parts.setdefault(split, []).append(Images.of(child))
            else:
                todo.append(child)
    if "train" not in parts:
        parts["train"] = others
    return {
        split: Images.joined(parts[split])
        for split in ("train", "validation", "test")
        if split in parts
    }


def tops(tree) -> list[Folder]:
    """Where a data set may begin: the root, and the only folder with images in it."""
    inside = tree.with_images()
    return [tree, *inside] if len(inside) == 1 else [tree]

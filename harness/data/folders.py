"""Image folders: the split and the class of each image, by the tree of folders alone.

The class is the first folder under the split, as in torchvision's ImageFolder, whatever lies
deeper. File names decide nothing. Images that are left out are counted and named; ambiguous
folders are refused. `read_folder` has the rules in their order.
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

# Word in the name of a folder -> the split that it stands for
SPLIT_WORDS = {
    "train": "train", "training": "train", "trainset": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "valset": "validation", "testset": "test",
}  # fmt: skip
UNLABELLED = re.compile(
    r"(test|testing|val|valid|validation|eval|evaluation|unlabell?ed|inference)\d*"
)
# Names of folders that hold all images, or what belongs to them, rather than those of one class
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
    """The split that a folder's name stands for; None if it has no such word, or two.

    >>> split_of("seg_train"), split_of("test1"), split_of("TrainingSet"), split_of("contest")
    ('train', 'test', 'train', None)
    """
    tokens = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    splits = {SPLIT_WORDS[token.lower()] for token in tokens if token.lower() in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def by_split(folders) -> dict[str, Folder]:
    """{split: folder} of the folders with a split's name; UserError for two of one split."""
    splits: dict[str, Folder] = {}
    for folder in folders:
        split = split_of(folder.name)
        if split in splits:
            raise UserError(
                f"{splits[split].shown()} and {folder.shown()} are both the split '{split}': keep "
                "one of them"
            )
        if split:
            splits[split] = folder
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def read_folder(root, tree, layout="auto") -> Listing:
    """The splits and classes of a tree of images. Raises UserError where they are ambiguous.

    The first rule that fits holds, at the root or, where that is all it has, in its only folder:
    1. Folders with a split's name hold class folders, and one of them is train: TRAIN/CLASS.
    2. Every folder holds folders with a split's name and images directly inside: CLASS/TRAIN.
    3. Several folders are data sets of their own: refused.
    4. Folders are classes, and a flat test folder beside them is unlabelled. Where all folders have
       a split's name, they are refused.
    layout: "classes" for every folder as a class; "splits" for every folder with a split's name as
    a split; or "auto", for these rules.
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
    elif class_splits := _splits_of_classes(top):
        listing = _under_classes(class_splits)
    else:
        _refuse_several(root, top)
        listing = _class_folders(root, top)
    return listing


def _unwrapped(tree, layout):
    """The folder in which the splits or classes are: the root, or its only folder with images."""
    inside = tree.with_images()
    if len(inside) != 1 or tree.images or (layout == "classes" and inside[0].images):
        return tree
    (only,) = inside
    if only.images or (split_of(only.name) and layout != "classes"):
        return tree
    return only


def _split_folders(top) -> dict[str, Folder]:
    """{split: folder} of the folders with a split's name that hold class folders.

    Empty without one for train. seg_train/seg_train/CLASS is read as seg_train/CLASS.
    """
    splits = by_split(folder for folder in top.with_images() if folder.with_images())
    for split, folder in splits.items():
        inside = folder.with_images()
        again = len(inside) == 1 and not folder.images and split_of(inside[0].name) == split
        if again and inside[0].with_images():
            splits[split] = inside[0]
    return splits if "train" in splits else {}


def _under_splits(top, splits):
    listing = Listing({}, has_splits=True)
    for folder in top.with_images():
        flat = not folder.with_images()
        if flat and (split_of(folder.name) or UNLABELLED.fullmatch(folder.name.lower())):
            listing.leave_unlabelled(Images.of(folder).paths)
    train_classes = {folder.name for folder in splits["train"].with_images()}
    for split, folder in splits.items():
        classes = folder.with_images()
        if split != "train" and len(classes) == 1 and _holds_all_classes(classes[0], train_classes):
            listing.leave_unlabelled(Images.of(folder).paths)
            continue
        listing.splits[split] = Images.joined(Images.of(c, c.name) for c in classes)
        _note_odd_classes(listing, folder, classes)
    return listing


def _holds_all_classes(folder, train_classes=()):
    """Whether a split's only folder holds its images of all classes, as test/images/*.jpg."""
    name = folder.name.lower()
    return folder.name not in train_classes and bool(name in GENERIC or split_of(name))


def labelled_splits(tree) -> dict[str, Images]:
    """{split: images} of the folders with a split's name that hold class folders."""
    for top in tops(tree):
        splits = {}
        for split, folder in by_split(top.with_images()).items():
            classes = folder.with_images()
            if len(classes) > 1 or (classes and not _holds_all_classes(classes[0])):
                splits[split] = Images.joined(Images.of(c, c.name) for c in classes)
        if splits:
            return splits
    return {}


def _splits_of_classes(top) -> dict[str, dict[str, Folder]]:
    """{class: {split: folder}} where class folders hold the splits; UserError if only some do."""
    class_splits = {
        folder.name: by_split(child for child in folder.folders if child.images)
        for folder in top.with_images()
    }
    with_train = [name for name, splits in class_splits.items() if "train" in splits]
    without = [name for name in class_splits if name not in with_train]
    if with_train and without:
        raise UserError(
            f"{with_train[0]}/ holds the folder of a train split, but {few(without)} "
            f"{'does' if len(without) == 1 else 'do'} not: --layout classes treats every folder as "
            "a class"
        )
    return class_splits if with_train else {}


def _under_classes(class_splits):
    listing = Listing({}, has_splits=True)
    listing.notes.append("the splits lie in the class folders: CLASS/train")
    for split in ("train", "validation", "test"):
        images = [
            Images.of(splits[split], name)
            for name, splits in class_splits.items()
            if split in splits
        ]
        if images:
            listing.splits[split] = Images.joined(images)
    return listing


def _refuse_several(root, top):
    """Raise UserError for a folder of several data sets, each with splits and classes."""
    names = [f.name for f in top.with_images() if not split_of(f.name) and _has_train(f)]
    if names:
        raise UserError(
            f"{root} holds {counted(len(names), 'data set')} with splits of their own, "
            f"{few(names)}: give one of them as --dataset ({EXPECTED})"
        )


def _has_train(folder):
    return any(split_of(f.name) == "train" and f.with_images() for f in folder.with_images())


def _class_folders(root, top):
    """Every folder is a class, except flat ones whose names say that they are unlabelled."""
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
    _note_odd_classes(listing, top, folders)
    return listing


def _note_odd_classes(listing, parent, classes):
    """Add notes on folders that perhaps should not be classes, and on those without images."""
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
            "folder is; if a table has the labels, give it as --labels FILE"
        )
    empty = [f.shown() for f in parent.folders if not f.total]
    if empty:
        listing.notes.append(f"no image that can be read in {few(empty)}: not a class")


MAX_PREFIXES = 8  # words that file names begin with, in a pattern that lists them


def other_ways(tree):
    """Advice for when folders do not say the classes, with the tables that may say them."""
    top = [tree, *tree.folders]
    tables = [f"{f.path}/{name}".lstrip("/") for f in top for name in f.tables]
    listed = f" ({'there is' if len(tables) == 1 else 'there are'} {few(tables)})" if tables else ""
    names = [name for folder in tree.walk() for name in folder.images]
    pattern = _pattern_of(names)
    example = f"'{pattern}' here{_alike(pattern)}" if pattern else "'/(cat|dog)[.]'"
    return (
        f"If the file names say the class, --label_pattern reads it from them, as {example}; "
        f"if a table does, give it as --labels FILE{listed}"
    )


def _pattern_of(names):
    """A --label_pattern if all file names begin with one of a few words, as cat.0.jpg; else "".

    What cameras call every file is no class: such files may be the smaller part of the others.
    """
    matches = [match[0] for name in names if (match := re.match(r"[^\W\d_]+", name))]
    prefixes = Counter(prefix for prefix in matches if prefix.casefold() not in CAMERA_WORDS)
    if not 1 < len(prefixes) <= MAX_PREFIXES or len(matches) < len(names):
        return ""
    if prefixes.total() < len(names) / 2:
        return ""
    if min(prefixes.values()) < 2:
        return ""
    longest_first = sorted(prefixes, key=lambda prefix: (-len(prefix), prefix))
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
        other_files = sum((folder.other_files for folder in tree.walk()), Counter())
        content = ", ".join(by_suffix(other_files)) or "nothing"
        return f"{root} has no images: {EXPECTED}, found {content}"
    return (
        f"{root} has {counted(len(tree.images), 'image')} directly inside and no class folders: "
        f"{EXPECTED}, found {tree.images[0]}. If it is the folder of one class, give the folder "
        f"that it is in. {other_ways(tree)}"
    )


# -- classes by file names -----------------------------------------------------------------------


def read_pattern(root, tree, pattern) -> Listing:
    """Splits by folders, classes by `pattern` in the path of each image relative to the root."""
    try:
        regex = re.compile(class_key(pattern))
    except re.error as error:
        raise UserError(f"--label_pattern {pattern}: {error}") from None
    if regex.groups != 1:
        raise UserError(
            f"--label_pattern {pattern} has {regex.groups} groups: it must have one, which matches "
            "the class, as in '/(cat|dog)[.]'; parentheses that begin with ?: are no group"
        )
    listing = Listing({}, "folders of the splits", f"from file names by {pattern}")
    splits = split_images(tree)
    for split, images in splits.items():
        matches = [search_path(regex, path) for path in images.paths]
        labels = [match and match[1] and class_key(match[1]) for match in matches]
        matched = np.array([bool(label) for label in labels])
        if not matched.any():
            listing.leave_unlabelled(images.paths)
            continue
        images.labels = labels
        without = [images.paths[k] for k in np.flatnonzero(~matched)]
        if len(without) > len(images) / 2:
            raise UserError(
                f"--label_pattern {pattern} matches {matched.sum():,} of {len(images):,} images of "
                f"split '{split}', under half; it does not match {few(without)}"
            )
        if without:
            listing.reported += without
            listing.left_out.append(
                f"{len(without):,} of {split} that --label_pattern does not match: {few(without)}"
            )
        listing.splits[split] = images.select(matched)
    if "train" not in listing.splits:
        example = few(splits["train"].paths if "train" in splits else (), 1)
        raise UserError(
            f"--label_pattern {pattern} matches no train image's path under {root}: {example}"
        )
    return listing


def split_images(tree) -> dict[str, Images]:
    """{split: images} by the folders with a split's name, wherever they lie.

    Beside a train folder, all folders with a split's name count (seg_train, seg_test); elsewhere
    only those with the whole name of a split: test, test1, val and so on.

    Images outside of these folders are train if there is no train folder, else of no split.
    """
    splits: dict[str, list[Images]] = {}
    outside = []
    todo = [tree]
    while todo:
        folder = todo.pop()
        names = {child.path: split_of(child.name) for child in folder.with_images()}
        if set(names.values()) == {"train", None}:
            names = {}  # train is the name of a class here
        outside.append(Images.directly_in(folder))
        for child in reversed(folder.with_images()):
            split = names.get(child.path)
            beside_train = "train" in names.values()
            if split and (beside_train or STRICTLY_SPLIT.fullmatch(child.name.lower())):
                splits.setdefault(split, []).append(Images.of(child))
            else:
                todo.append(child)
    if "train" not in splits:
        splits["train"] = outside
    return {
        split: Images.joined(splits[split])
        for split in ("train", "validation", "test")
        if split in splits
    }


def tops(tree) -> list[Folder]:
    """Where a data set may begin: the root, and the only folder with images in it."""
    inside = tree.with_images()
    return [tree, *inside] if len(inside) == 1 else [tree]

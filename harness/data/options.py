"""The flags that say which images of a data set are used, and as which split; their checks."""

from __future__ import annotations

from dataclasses import dataclass

from harness.data.folders import SPLIT_WORDS
from harness.data.parts import check_group_pattern, parse_fold
from harness.errors import UserError, nearest

SPLIT_NAMES = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class DataOptions:
    """The flags that say which images of a data set are used, and as which split."""

    image_column: str | None = None  # None: the only column of images
    label_column: str | None = None  # None: see harness.data.tables.find_label
    train_split: str | None = None  # None: "train"
    val_split: str | None = None  # None: the stored one, if there is one; "none": no such split
    test_split: str | None = None  # as val_split
    val_fraction: float = 0.0  # the part of train to hold out, stratified, in [0, 1)
    fold: str | None = None  # "2/5": hold out the second of five parts of train
    group_column: str | None = None  # images of one value are all held out, or all trained on
    group_pattern: str | None = None  # the same, for a regular expression on the images' paths
    max_train_samples: int | None = None  # use that many of train, stratified; None for all
    max_eval_samples: int | None = None  # the same for validation and test
    seed: int = 42  # alone decides which samples are held out, and which of too many are used
    bad_images: str = "stop"  # "skip": leave out unreadable images, before anything is held out
    bit_depth: int | None = None  # of 16-bit gray images; None: the depth in the file, else 16
    empty_classes: str = "refuse"  # of classes without a train image: "refuse", "drop" or "keep"
    # For folders of images only, see harness.data.images.load_images
    layout: str = "auto"
    label_pattern: str | None = None
    labels: str | None = None
    file_column: str | None = None
    classes: str | None = None

    def of_folders(self) -> dict:
        """The options that are for folders of images only."""
        names = ("layout", "label_pattern", "labels", "file_column", "classes")
        return {name: getattr(self, name) for name in names}

    def chosen(self, names) -> dict[str, str | None]:
        """{role: stored split} for train, val and test; None for a role without a split."""
        flags = {role: getattr(self, f"{role}_split") for role in SPLIT_NAMES}
        return _choose_splits(names, flags)


@dataclass(frozen=True)
class SplitOptions:
    """The flags that say on which images a finished run is used."""

    dataset: str | None = None  # None: the data set that the run was trained on
    split: str | None = None  # "train", "val" or "test"; None: the script's default
    image_column: str | None = None
    label_column: str | None = None
    max_eval_samples: int | None = None
    seed: int = 42  # decides which of too many samples are used


DEFAULT_OF_FOLDERS = DataOptions().of_folders()


def check_options(options):
    """Raise UserError for values out of range, and for flags that exclude each other."""
    for flag, value in vars(options).items():
        if value == "":
            raise UserError(f"--{flag} is empty: give it a value, or leave it out")
    if not 0 <= options.val_fraction < 1:
        raise UserError(
            f"--val_fraction is {options.val_fraction}: it must be at least 0 and below 1"
        )
    if options.fold:
        try:
            parse_fold(options.fold)
        except ValueError as error:
            raise UserError(f"--fold {error}") from None
        if options.val_fraction:
            raise UserError("--fold and --val_fraction both say what is held out: give one of them")
    if options.group_column and options.group_pattern:
        raise UserError("--group_column and --group_pattern both say the groups: give one of them")
    if options.group_pattern:
        check_group_pattern(options.group_pattern)
    for flag in ("max_train_samples", "max_eval_samples"):
        count = getattr(options, flag)
        if count is not None and count < 1:
            raise UserError(f"--{flag} is {count}: it must be at least 1 (leave it out for all)")
    class_flags = [
        f"--{name}"
        for name in ("layout", "labels", "label_pattern")
        if getattr(options, name) not in (None, "auto")
    ]
    if len(class_flags) > 1:
        raise UserError(f"{' and '.join(class_flags)} both say the classes: give one of them")


def check_no_folder_flags(name, options):
    """Raise UserError for a flag that is for folders of images only."""
    flags = [f for f, value in options.of_folders().items() if value != DEFAULT_OF_FOLDERS[f]]
    if flags:
        raise UserError(f"--{flags[0]} is for folders of images, which {name} is not")


def _choose_splits(stored, flags):
    """{"train": name, "val": name or None, "test": name or None} of the stored splits.

    flags: {role: value of --train_split, --val_split or --test_split}.
    """
    chosen = {}
    for role, name in flags.items():
        if name is None or (name == "none" and role != "train"):
            continue
        name = name if name in stored else SPLIT_WORDS.get(name.lower(), name)
        if name not in stored:
            raise UserError(
                f"--{role}_split {name}: there is no such split{nearest(name, stored)} "
                f"(the splits are {', '.join(stored)})"
            )
        if name in chosen.values():
            raise UserError(f"--{role}_split {name}: that split already has another use")
        chosen[role] = name
    for role, names in SPLIT_NAMES.items():
        if flags[role] is None:
            unused = [name for name in names if name in stored and name not in chosen.values()]
            chosen[role] = unused[0] if unused else None
        else:
            chosen.setdefault(role, None)  # "none"
    if chosen["train"] is None:
        raise UserError(
            f"there is no split 'train': name one with --train_split ({', '.join(stored)})"
        )
    return {role: chosen[role] for role in SPLIT_NAMES}

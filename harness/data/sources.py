"""A data set by its name: its splits, classes and labels, cut to the samples that are used."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from harness.data.cache import find_bad
from harness.data.columns import (
    check_split,
    find_classes,
    find_image_column,
    find_label_column,
    read_labels,
)
from harness.data.listing import counted
from harness.data.options import DataOptions, check_options
from harness.data.parts import (
    grouping_note,
    held_out,
    read_groups,
    shared_groups_note,
    stratified_order,
)
from harness.data.pixels import content_of, gray_depth_note, native_size
from harness.data.stored import (
    BUILT_IN,
    IMAGENET_STATISTICS,
    check_sizes,
    copied_built_in,
    find_stored,
)
from harness.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset  # otherwise imported late: a second that `--help` does not need


@dataclass(frozen=True)
class Split:
    """Some rows of a stored split. Sample i is row `rows[i]` of `dataset`, its label `labels[i]`.

    A train split and the validation split held out of it share one `dataset`, so that it is
    decoded once whatever the fraction and the seed are.
    """

    name: str  # as stored, for messages: a held-out validation split has the name of its source
    dataset: Dataset = field(repr=False)
    rows: np.ndarray = field(repr=False)  # int64 (n,)
    labels: np.ndarray = field(repr=False)  # int64 (n,), indices into Data.classes
    stored: np.ndarray | None = field(default=None, repr=False)  # rows before a cut, if any
    bit_depth: int | None = None  # of 16-bit gray images, see harness.data.pixels.decode_image

    def __len__(self):
        return len(self.rows)


@dataclass(frozen=True)
class Data:
    """A data set ready to be decoded (`harness.data.cache.decode_split`)."""

    name: str  # as the user gives it
    source: str  # the place it was read from: id@revision, or a folder
    classes: list[str]
    image_column: str
    label_column: str
    train: Split
    val: Split | None
    test: Split | None
    image_size: int  # px: the images' own size where all are the same small square, else 224
    mean: tuple[float, float, float]  # of pixels in 0..1
    std: tuple[float, float, float]
    # {split: {row: reason}} of unreadable images, which are left out
    bad: dict[str, dict[int, str]] = field(default_factory=dict)
    labels_from: str = ""  # where the labels come from, for the plan
    notes: list[str] = field(default_factory=list)  # lines of the plan on how it was read
    left_out: list[str] = field(default_factory=list)  # lines of the plan on what is not used
    # {split: [images, sha256]}, of a folder's files or of harness.data.pixels.content_of
    content: dict[str, list] = field(default_factory=dict)


def load_data(dataset, **options) -> Data:
    """Find a data set, its columns and its splits, and check every label.

    dataset: a built-in name (`BUILT_IN`), a Hub id (`owner/name`, or `owner/name:config`), or a
    folder (or `folder:config`): parquet in the Hub's layout, `save_to_disk`, or images in class
    folders or beside a table. options: fields of `DataOptions`.

    Raises UserError, with a message of one line, for anything that the user can correct.
    """
    options = DataOptions(**options)
    check_options(options)
    built_in = BUILT_IN.get(dataset)
    stored_data = find_stored(dataset, built_in, options)
    stored = stored_data.splits
    if built_in:
        check_sizes(dataset, stored, built_in.splits)
    else:
        built_in = copied_built_in(dataset, stored)
    chosen = options.chosen(stored)
    setting = f"--fold is {options.fold}" if options.fold else ""
    setting = setting or (options.val_fraction and f"--val_fraction is {options.val_fraction}")
    if setting and chosen["val"]:
        raise UserError(
            f"{setting}, but {dataset} has the validation split '{chosen['val']}': leave "
            f"{setting.split()[0]} out, or pass --val_split none"
        )
    unused = [
        f"{len(split):,} images of split '{name}', which is not used"
        for name, split in stored.items()
        if name not in chosen.values()
    ]
    features = stored[chosen["train"]].features
    image_column = find_image_column(features, options.image_column)
    label_column = stored_data.label_column or options.label_column
    label_column = label_column or (built_in and built_in.label_column)
    label_column = find_label_column(features, label_column, image_column)
    values, classes = find_classes(stored[chosen["train"]], label_column)
    splits = _labelled(stored, chosen, image_column, label_column, values, options.bit_depth)
    bad = _skip_bad(splits, image_column, options)
    notes = list(stored_data.notes)
    if not options.bit_depth and (note := gray_depth_note(splits["train"].dataset, image_column)):
        notes.append(note)
    if options.empty_classes == "drop":
        splits, classes, dropped = _without_empty(splits, classes)
        notes += [f"--empty_classes drop: {dropped:,} without a train image"] if dropped else []
    elif options.empty_classes == "refuse":
        _check_every_class(splits["train"], classes)
    if len(classes) < 2:
        raise UserError(f"{dataset} has 1 class, {classes[0]}: there is nothing to tell apart")
    splits = _split_train(splits, options, classes, image_column, stored_data.source, notes)
    mean, std = built_in.statistics if built_in else IMAGENET_STATISTICS
    train = cut(splits["train"], options.max_train_samples, options.seed)
    if options.empty_classes != "keep" and len(np.unique(train.labels)) < len(classes):
        raise UserError(
            f"--max_train_samples {options.max_train_samples} keeps images of only "
            f"{len(np.unique(train.labels))} of {len(classes)} classes: keep more"
        )
    return Data(
        name=dataset,
        source=stored_data.source,
        classes=classes,
        image_column=image_column,
        label_column=label_column,
        train=train,
        val=cut(splits["val"], options.max_eval_samples, options.seed),
        test=cut(splits["test"], options.max_eval_samples, options.seed),
        image_size=native_size(stored[chosen["train"]], image_column) or 224,
        mean=mean,
        std=std,
        bad=bad,
        labels_from=stored_data.labels_from or f"in column {label_column}",
        notes=notes,
        left_out=stored_data.left_out + unused,
        content=_content(stored_data, chosen, image_column),
    )


def _content(stored_data, chosen, image_column):
    """{split: [images, sha256]} of those chosen: see `Data.content`."""
    content = {
        name: stored_data.content.get(name) or content_of(stored_data.splits[name], image_column)
        for name in chosen.values()
        if name is not None
    }
    return content if all(content.values()) else {}


def _labelled(stored, chosen, image_column, label_column, values, bit_depth):
    """{role: Split or None} of the chosen splits, with every label checked.

    stored: {name: Dataset}. chosen: {role: name or None}. values: the labels of the classes, in
    their order.
    """
    splits, features = {}, stored[chosen["train"]].features
    for role, name in chosen.items():
        if name is None:
            splits[role] = None
            continue
        check_split(name, stored[name], features, image_column, label_column)
        labels = read_labels(name, role, stored[name], label_column, values)
        rows = np.arange(len(labels))
        splits[role] = Split(name, stored[name], rows, labels, bit_depth=bit_depth)
    return splits


def _skip_bad(splits, image_column, options):
    """With --bad_images skip, take unreadable images out of `splits`; {split: {row: reason}}."""
    bad = {}
    for role, split in splits.items() if options.bad_images == "skip" else ():
        unreadable = split and find_bad(
            split.dataset, image_column, name=split.name, bit_depth=options.bit_depth
        )
        if unreadable:
            bad[split.name] = unreadable
            splits[role] = _leave_out(split, unreadable)
    return bad


def _without_empty(splits, classes):
    """(splits, classes, the number of classes left out): leaves out those without a train image."""
    counts = np.bincount(splits["train"].labels, minlength=len(classes))
    used = np.flatnonzero(counts)
    new_labels = np.full(len(classes), -1)
    new_labels[used] = np.arange(len(used))
    for role, split in splits.items():
        if split is None:
            continue
        labels = new_labels[split.labels]
        if labels.min(initial=0) < 0:
            name = classes[int(split.labels[labels.argmin()])]
            raise UserError(
                f"--empty_classes drop: split '{split.name}' has images of {name!r}, of which "
                "train has none"
            )
        splits[role] = replace(split, labels=labels)
    return splits, [classes[k] for k in used], len(classes) - len(used)


def _check_every_class(train, classes):
    """Raise UserError for classes without a train image."""
    counts = np.bincount(train.labels, minlength=len(classes))
    missing = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(
            f"{len(missing)} of {len(classes)} classes have no image among the {len(train):,} of "
            f"split '{train.name}': {shown}; --empty_classes drop leaves them out, "
            "--empty_classes keep keeps them"
        )


def _leave_out(split, bad):
    """The split without its rows `bad`, {row: reason}."""
    rows = np.setdiff1d(split.rows, list(bad))
    if not len(rows):
        row, reason = next(iter(bad.items()))
        raise UserError(
            f"none of the {len(bad):,} images of split '{split.name}' can be read "
            f"(image {row}: {reason})"
        )
    return replace(split, rows=rows, labels=split.labels[rows])


# -- parts of a split ----------------------------------------------------------------------------


def _split_train(splits, options, classes, image_column, root, notes):
    """`splits`, where --val_fraction or --fold cut val out of train; adds lines on it to `notes`.

    Groups (--group_column, --group_pattern) are read from all splits, which should share none.
    """
    train, groups = splits["train"], None
    if options.group_column or options.group_pattern:
        present = {role: split for role, split in splits.items() if split is not None}
        column, pattern = options.group_column, options.group_pattern
        groups_of = {
            role: read_groups(split, column, pattern, image_column, root)
            for role, split in present.items()
        }
        groups = groups_of["train"][0]
        notes += [note] if (note := shared_groups_note(present, groups_of)) else []
    if not (options.val_fraction or options.fold):
        return splits
    val = held_out(train, options, classes, groups)
    if groups is not None:
        by = column or f"'{pattern}'"
        notes.append(grouping_note(train, groups, val, by, classes))
        ungrouped = sum(name.startswith("\0") for name in groups_of["train"][1])
        if ungrouped:
            notes.append(f"{counted(ungrouped, 'image')} without {by}: each is a group of its own")
    elif options.fold:
        notes.append(f"held out: fold {options.fold} of train, {len(val):,} images")
    rest = np.setdiff1d(np.arange(len(train)), val)  # sorted, so that the pixels are read in order
    pieces = [replace(train, rows=train.rows[k], labels=train.labels[k]) for k in (rest, val)]
    return splits | dict(zip(("train", "val"), pieces, strict=True))


def cut(split, max_samples, seed):
    """The split with at most `max_samples`: the first in a stratified order drawn from the seed."""
    if split is None or max_samples is None or max_samples >= len(split):
        return split
    chosen = np.sort(stratified_order(split.labels, seed)[:max_samples])
    # A data set of its own, so that a short run on ImageNet does not decode all of it
    dataset = split.dataset.select(split.rows[chosen])
    stored = stored_rows(split)[chosen]
    return replace(
        split,
        dataset=dataset,
        rows=np.arange(max_samples),
        labels=split.labels[chosen],
        stored=stored,
    )


def stored_rows(split):
    """The row of each sample in the stored split, before any cut: int64 (n,)."""
    return split.rows if split.stored is None else split.stored

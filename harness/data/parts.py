"""Parts of a split: samples held out for validation, at random, by fold or by whole groups.

They depend on the labels, the groups and the seed alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from harness.counters import generator
from harness.data.listing import class_key, counted, few, search_path
from harness.errors import UserError, nearest


def stratified_order(labels, seed):
    """An order of the samples in which the first k, for every k, have the classes in proportion.

    The j-th of the n_c samples of class c, shuffled, is put at (j + ½) / n_c; so the first k
    hold each class k · n_c / n times, give or take one, and a larger k only adds to them.

    >>> labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
    >>> np.bincount(labels[stratified_order(labels, seed=0)[:3]]).tolist()
    [2, 1]
    """
    shuffled = torch.randperm(len(labels), generator=generator(seed, "split")).numpy()
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)  # where the class of each begins
    # Ties (all of them in a balanced set) fall in the order of the shuffle, not of the classes.
    position = np.empty(len(labels), dtype=np.float64)
    position[by_class] = (np.arange(len(labels)) - starts + 0.5) / np.repeat(counts, counts)
    return shuffled[np.argsort(position[shuffled], kind="stable")]


def stratified_fold(labels, fold, folds, seed):
    """The samples of fold number `fold` (from 0) of `folds`: sorted int64 indices.

    Folds are consecutive pieces of the stratified order: every sample is in one of them, and each
    fold has the classes in proportion.
    """
    bounds = [round(len(labels) * k / folds) for k in (fold, fold + 1)]
    return np.sort(stratified_order(labels, seed)[slice(*bounds)])


def grouped_parts(labels, groups, shares, seed):
    """The part to which each sample goes, int64 (n,); all samples of a group go to one part.

    labels: int64 (n,), classes. groups: int64 (n,), from 0. shares: the share of the samples that
    each part should get; their sum is 1.

    Groups are placed one by one, the largest first, and groups of one size in a drawn order. Each
    goes to the part where it keeps the number of every class nearest to the part's share. With
    n_c samples of class c, f_c of them in the part so far and g_c in the group, that is the part
    with the smallest Σ over c of (2 f_c + g_c) · g_c / (share · n_c).
    """
    num_groups, num_classes = int(groups.max()) + 1, int(labels.max()) + 1
    counts = np.zeros((num_groups, num_classes))
    np.add.at(counts, (groups, labels), 1)
    totals, shares = counts.sum(0).clip(min=1), np.asarray(shares, float)
    drawn = torch.randperm(num_groups, generator=generator(seed, "groups")).numpy()
    order = drawn[np.argsort(-counts[drawn].sum(1), kind="stable")]
    filled, part_of_group = np.zeros((len(shares), num_classes)), np.zeros(num_groups, np.int64)
    for group in order:
        weights = counts[group] / totals
        costs = ((2 * filled + counts[group]) @ weights) / shares
        part_of_group[group] = int(costs.argmin())
        filled[part_of_group[group]] += counts[group]
    return part_of_group[groups]


def read_groups(split, column, pattern, image_column, root):
    """(the number of each sample's group, int64 (n,), from 0; the names of the groups).

    column: a column of the data set, or "folder" (if no column has that name): the name of the
    folder in which the image lies, so that p07 of one class and p07 of another are one group.
    pattern: instead of a column, a regular expression for the image's path relative to `root`; what
    its parentheses match is the name of the group. An image without a value is a group of its own.
    Raises UserError where there is no such column, no path or no match.
    """
    if pattern is not None:
        values = _matches(_paths(split, image_column, root, f"--group_pattern {pattern}"), pattern)
    elif column in split.dataset.features and column != image_column:
        cells = split.dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        values = [cells[row] for row in split.rows.tolist()]
    elif column == "folder":
        paths = _paths(split, image_column, root, "--group_column folder")
        values = [f"/{path}".split("/")[-2] for path in paths]
    else:
        columns = [name for name in split.dataset.features if name != image_column]
        raise UserError(
            f"--group_column {column}: split '{split.name}' has no column of that name"
            f"{nearest(column, columns)} (its columns are {', '.join(columns)}; folder is the "
            "folder of each image)"
        )
    # Tables have NaN for no value, and NaN does not equal itself
    without = [value in (None, "") or value != value for value in values]
    names = [f"\0{k}" if without[k] else str(value) for k, value in enumerate(values)]
    group_names, groups = np.unique(np.array(names, object), return_inverse=True)
    return groups.astype(np.int64), list(group_names)


def _paths(split, image_column, root, flag):
    """Each image's path, relative to `root` if it lies there; UserError for one without a path."""
    cells = split.dataset.select_columns([image_column]).with_format("arrow")
    paths = []
    for start in range(0, len(split), 1000):  # without the bytes of the images
        rows = split.rows[start : start + 1000]
        column = cells.select(rows).with_format("arrow")[:][image_column].combine_chunks()
        paths += column.field("path").to_pylist()
    if any(path is None for path in paths):
        raise UserError(
            f"{flag}: split '{split.name}' does not say its images' paths; a column of groups can "
            "be named with --group_column"
        )
    base = f"{Path(root).resolve()}/"
    return [path.removeprefix(base).replace("\\", "/") for path in paths]


def _matches(paths, pattern):
    """What the parentheses of `pattern` match in each path."""
    values, regex = [], re.compile(class_key(pattern))
    for path in paths:
        match = search_path(regex, path)
        if not match:
            raise UserError(f"--group_pattern {pattern} matches nothing in {path}")
        values.append(match[1])
    return values


def parse_fold(text):
    """ "2/5" as (1, 5): the number counts from 0. Raises ValueError for a text that is no fold."""
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    number, folds = (int(digits) for digits in match.groups()) if match else (0, 0)
    if not 1 <= number <= folds or folds < 2:
        raise ValueError(f"{text} is no fold: 1/5 is the first of five")
    return number - 1, folds


def check_group_pattern(pattern):
    """Raise UserError unless it is a regular expression with one group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"--group_pattern {pattern} is not a regular expression: {error}") from None
    if groups != 1:
        raise UserError(
            f"--group_pattern {pattern} has {groups} groups in parentheses: it must have one, "
            "which matches the name of the group"
        )


def held_out(train, options, classes, groups=None):
    """The samples of `train` to hold out by --fold or --val_fraction: sorted int64 indices.

    groups: int64 (n,); the samples of a group are all held out, or all trained on. None: without
    groups. Raises UserError where a class would be missing on one side, and for more folds than
    groups.
    """
    labels, seed = train.labels, options.seed
    if options.fold:
        fold, folds = parse_fold(options.fold)
        flag = f"--fold {options.fold}"
    else:
        flag = f"--val_fraction {options.val_fraction}"
    if groups is None and options.fold:
        val = stratified_fold(labels, fold, folds, seed)
    elif groups is None:
        num_val = round(options.val_fraction * len(train))
        val = np.sort(stratified_order(labels, seed)[:num_val])
    else:
        count = len(np.unique(groups))
        if count < (folds if options.fold else 2):
            raise UserError(f"{flag}: there are only {count} groups in split '{train.name}'")
        if options.fold:
            folds_of_samples = grouped_parts(labels, groups, [1 / folds] * folds, seed)
            val = np.flatnonzero(folds_of_samples == fold)
        else:
            shares = [options.val_fraction, 1 - options.val_fraction]
            val = np.flatnonzero(grouped_parts(labels, groups, shares, seed) == 0)
    _check_classes(train, flag, classes, val, groups)
    return val


def _check_classes(train, flag, classes, val, groups):
    """Raise UserError unless each class has images to train on and, without groups, held out."""
    everywhere = np.bincount(train.labels, minlength=len(classes))
    out = np.bincount(train.labels[val], minlength=len(classes))
    sides = [("training", everywhere - out)]
    sides += [("validation", out)] if groups is None else []
    for side, counts in sides:
        lacking = np.flatnonzero((counts == 0) & (everywhere > 0))
        if len(lacking):
            name, total = classes[lacking[0]], everywhere[lacking[0]]
            advice = "too few to stratify, choose another fraction"
            if groups is not None:
                count = len(np.unique(groups[train.labels == lacking[0]]))
                advice = f"its images are of {counted(count, 'group')}: use more, or other groups"
            raise UserError(
                f"{flag} holds out {len(val):,} of {len(train):,} images and leaves {side} none "
                f"of class '{name}' (which has {total}): {advice}"
            )
    if not len(val):
        raise UserError(
            f"{flag} holds out none of the {len(train):,} images: they are of "
            f"{counted(len(np.unique(groups)), 'group')}, each too large"
            if groups is not None
            else f"{flag} holds out none of the {len(train):,} images"
        )


def grouping_note(train, groups, val, by, classes):
    """The plan's line on a split by groups: how many are held out, and the classes without any."""
    val_groups = np.unique(groups[val])
    text = (
        f"held out by {by}: {len(val_groups):,} of {len(np.unique(groups)):,} groups, "
        f"{len(val):,} of {len(train):,} images, no group on both sides"
    )
    everywhere, in_val = (
        np.bincount(labels, minlength=len(classes)) for labels in (train.labels, train.labels[val])
    )
    shares = [counts / max(counts.sum(), 1) for counts in (everywhere, in_val)]
    text += f"; classes' shares within {100 * np.abs(shares[0] - shares[1]).max():.1f} points"
    lacking = [classes[k] for k in np.flatnonzero((in_val == 0) & (everywhere > 0))]
    if lacking:
        text += f"; without an image of {few(lacking)}"
    return text


def shared_groups_note(splits, groups_of):
    """A warning where another split has groups of train, or "".

    splits: {role: Split}, train first. groups_of: {role: result of `read_groups`}.
    """
    (train_role, (_, train_names)), *held_out_splits = groups_of.items()
    for role, (groups, names) in held_out_splits:
        shared = {name for name in set(train_names) & set(names) if not name.startswith("\0")}
        if shared:
            mask = np.isin(groups, [k for k, name in enumerate(names) if name in shared])
            return (
                f"warning: {len(shared):,} groups, such as {sorted(shared)[0]}, are in split "
                f"'{splits[train_role].name}' and in '{splits[role].name}', where they have "
                f"{int(mask.sum()):,} of {len(mask):,} images: scores there will be too good"
            )
    return ""

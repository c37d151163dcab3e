"""Parts of a split: what is held out for validation, at random, by fold or by whole groups.

All are pure functions of the labels, the groups and the seed.
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
    """An order of the samples of which every beginning has the classes in proportion.

    The j-th of the n_c samples of class c, shuffled, is put at (j + ½) / n_c; so the first k
    hold each class k · n_c / n times, give or take one, and a larger k only adds to them.

    >>> labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
    >>> np.bincount(labels[stratified_order(labels, seed=0)[:3]]).tolist()
    [2, 1]
    """
    shuffled = torch.randperm(len(labels), generator=generator(seed, "split")).numpy()
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    first = np.repeat(np.cumsum(counts) - counts, counts)  # where the class of each starts
    place = (np.arange(len(labels)) - first + 0.5) / np.repeat(counts, counts)
    # Ties (all of them in a balanced set) fall in the order of the shuffle, not of the classes.
    position = np.empty(len(labels), dtype=np.float64)
    position[by_class] = place
    return shuffled[np.argsort(position[shuffled], kind="stable")]


def stratified_fold(labels, fold, folds, seed):
    """The places of fold number `fold` (from 0) of `folds`: int64, sorted; every sample is in one.

    Consecutive pieces of the stratified order, so each has the classes in proportion.
    """
    bounds = [round(len(labels) * k / folds) for k in (fold, fold + 1)]
    return np.sort(stratified_order(labels, seed)[slice(*bounds)])


def grouped_parts(labels, groups, shares, seed):
    """The part that each sample goes to, int64 (n,), no group in two of them.

    labels: int64 (n,), classes. groups: int64 (n,), from 0. shares: of the samples that each part
    should get, of the sum 1.

    The largest groups are placed first, those of one size in a drawn order, each where it brings
    the parts' numbers of every class nearest to their shares: Σ over classes c of
    f_c · g_c / (share · n_c) is least, for f_c of the class in a part so far and g_c in the group.
    """
    num_groups, num_classes = int(groups.max()) + 1, int(labels.max()) + 1
    counts = np.zeros((num_groups, num_classes))
    np.add.at(counts, (groups, labels), 1)
    totals, shares = counts.sum(0).clip(min=1), np.asarray(shares, float)
    drawn = torch.randperm(num_groups, generator=generator(seed, "groups")).numpy()
    order = drawn[np.argsort(-counts[drawn].sum(1), kind="stable")]
    filled, part = np.zeros((len(shares), num_classes)), np.zeros(num_groups, np.int64)
    for group in order:
        weights = counts[group] / totals
        costs = ((2 * filled + counts[group]) @ weights) / shares
        part[group] = int(costs.argmin())
        filled[part[group]] += counts[group]
    return part[groups]


def read_groups(split, column, pattern, image_column, root):
    """(int64 (n,), the groups of a split's samples from 0; the names of the groups).

    column: of the data set; "folder", where there is none of that name: the name of the folder that
    the image lies in, so that p07 of one class and p07 of another are one group. pattern: a regular
    expression instead, whose one group is matched in the image's path, relative to `root`. An image
    without a value is a group of its own. Raises UserError where neither can be had.
    """
    if pattern is not None:
        values = _matched(_paths(split, image_column, root, f"--group_pattern {pattern}"), pattern)
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
    # NaN, which tables have for no value, is equal to nothing
    without = [value in (None, "") or value != value for value in values]
    names = [f"\0{k}" if without[k] else str(value) for k, value in enumerate(values)]
    known, groups = np.unique(np.array(names, object), return_inverse=True)
    return groups.astype(np.int64), list(known)


def _paths(split, image_column, root, flag):
    """Each image's path, below `root` where it is; UserError where the data set has none."""
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


def _matched(paths, pattern):
    values, regex = [], re.compile(class_key(pattern))
    for path in paths:
        match = search_path(regex, path)
        if not match:
            raise UserError(f"--group_pattern {pattern} matches nothing in {path}")
        values.append(match[1])
    return values


def parse_fold(text):
    """ "2/5" as (1, 5), from 0; raises ValueError for what is no fold."""
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    number, folds = (int(word) for word in match.groups()) if match else (0, 0)
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
            f"--group_pattern {pattern} has {groups} groups in parentheses: it wants one, which is "
            "the name of the group"
        )


def held_out(train, options, classes, groups=None):
    """The places of `train` that are held out, sorted int64, by --fold or --val_fraction.

    groups: int64 (n,), none of which is to be on both sides; None: every sample by itself. Raises
    UserError where a side would be without a class, and for more folds than groups.
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
            part = grouped_parts(labels, groups, [1 / folds] * folds, seed)
            val = np.flatnonzero(part == fold)
        else:
            shares = [options.val_fraction, 1 - options.val_fraction]
            val = np.flatnonzero(grouped_parts(labels, groups, shares, seed) == 0)
    _check_classes(train, flag, classes, val, groups)
    return val


def _check_classes(train, flag, classes, val, groups):
    """Every class must be left to train with, and, where no groups forbid it, be held out."""
    everywhere = np.bincount(train.labels, minlength=len(classes))
    out = np.bincount(train.labels[val], minlength=len(classes))
    sides = [("training", everywhere - out)]
    sides += [("validation", out)] if groups is None else []
    for side, counts in sides:
        lacking = np.flatnonzero((counts == 0) & (everywhere > 0))
        if len(lacking):
            name, have = classes[lacking[0]], everywhere[lacking[0]]
            why = "too few to stratify, choose another fraction"
            if groups is not None:
                own = len(np.unique(groups[train.labels == lacking[0]]))
                why = f"its images are of {counted(own, 'group')}: it wants more, or other groups"
            raise UserError(
                f"{flag} holds out {len(val):,} of {len(train):,} images and leaves {side} none "
                f"of class '{name}' (which has {have}): {why}"
            )
    if not len(val):
        raise UserError(
            f"{flag} holds out none of the {len(train):,} images: they are of "
            f"{counted(len(np.unique(groups)), 'group')}, each too large"
            if groups is not None
            else f"{flag} holds out none of the {len(train):,} images"
        )


def grouping_note(train, groups, val, by, classes):
    """What the plan says of a split by groups: how many are held out, and which classes are not."""
    out = np.unique(groups[val])
    words = (
        f"held out by {by}: {len(out):,} of {len(np.unique(groups)):,} groups, {len(val):,} of "
        f"{len(train):,} images, no group on both sides"
    )
    everywhere, there = (
        np.bincount(labels, minlength=len(classes)) for labels in (train.labels, train.labels[val])
    )
    shares = [counts / max(counts.sum(), 1) for counts in (everywhere, there)]
    words += f"; classes' shares within {100 * np.abs(shares[0] - shares[1]).max():.1f} points"
    lacking = [classes[k] for k in np.flatnonzero((there == 0) & (everywhere > 0))]
    if lacking:
        words += f"; without an image of {few(lacking)}"
    return words


def shared_groups_note(splits, named):
    """A warning where a stored split has groups of another one, or ""; named: {role: (groups,
    their names)} of the splits in `splits`, whose first is train."""
    (first, (_, ours)), *others = named.items()
    for role, (groups, names) in others:
        both = {name for name in set(ours) & set(names) if not name.startswith("\0")}
        if both:
            places = np.isin(groups, [k for k, name in enumerate(names) if name in both])
            return (
                f"warning: {len(both):,} groups are in split '{splits[first].name}' and in "
                f"'{splits[role].name}', there with {int(places.sum()):,} of {len(places):,} "
                f"images, as {sorted(both)[0]}: scores there will be too good"
            )
    return ""

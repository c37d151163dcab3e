"""The members of an ensemble, checked against each other, and the images to score them on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.console import words_of
from harness.data.sources import Split, cut, load_data, stored_rows
from harness.ensembles.combinations import LEAST_FITTED
from harness.errors import UserError
from harness.models.trained import check_classes, data_flags, dataset_path, read_trained
from tricks.tta import tta_views

COMBINATIONS = {"average", "vote", "weighted", "greedy", "uniform soup", "greedy soup"}


class Images(NamedTuple):
    """The images that members are compared on."""

    scored: Split
    role: str  # of `scored`: "test" or "val"
    fitted: Split | None  # no member was trained on these; None: too few
    train: Split  # the first member's
    image_column: str
    source: str
    whole: int  # how many `scored` are without --max_eval_samples


def read_members(paths):
    """The Trained of each folder, with names that tell them apart.

    Raises UserError for no folder at all, for a folder given twice, for two copies of the same
    weights, and for members whose classes differ.
    """
    if not paths:
        raise UserError("give the folders of trained runs: ensemble_eval.py runs/a runs/b runs/c")
    folders = [Path(path).resolve() for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"{path} is a member twice: give it once, and --member_weights")
    members = [read_trained(path) for path in paths]
    for n, member in enumerate(members):
        check_classes(member, members[0].classes, members[0].folder)
        for earlier in members[:n]:
            if earlier.sha256 == member.sha256:
                raise UserError(f"{earlier.folder} and {member.folder} hold the same weights")
    names = [member.name for member in members]
    unique = len(set(names)) == len(names) and not COMBINATIONS & set(names)
    return [m if unique else m._replace(name=f"{m.folder.parent}/{m.name}") for m in members]


def view_sets(tta, sizes, seed) -> dict:
    """{kind: {size: list of tricks.tta.View}} of the kinds in `--tta`, and of "none"."""
    kinds = dict.fromkeys([*words_of(tta), "none"])
    try:
        return {kind: {size: tta_views(kind, size, seed) for size in sizes} for kind in kinds}
    except ValueError as error:
        raise UserError(f"--tta: {error}") from None


def find_images(members, options) -> Images:
    """The images that the members are scored on, and those that weights may be fitted on.

    options: SplitOptions. The test split is scored, or without one (or with --split val) validation
    images. Fitting uses the images that some member held out for validation and that no member, nor
    a network it started from, was trained on; none if they are too few, as members of different
    seeds hold out different images. Raises UserError where there is nothing to score, and where a
    member was trained on images that would be scored.
    """
    recipes = [member.recipes[0] for member in members]
    sources = {dataset_path(recipe) for recipe in recipes}
    if len(sources) > 1 and not options.dataset:
        raise UserError(
            f"the members were trained on {' and '.join(sorted(sources))}: say with --dataset what "
            "to compare them on"
        )
    data_by_flags = {}
    trained, held_out = {}, {}  # stored split -> (its data set, labels by row, -1: not seen)
    for recipe in [recipe for member in members for recipe in member.recipes]:
        if "unknown" in recipe or dataset_path(recipe) not in sources:
            continue  # a network that a member came from has seen other images
        flags = data_flags(
            recipe, dataset=options.dataset, image_column=options.image_column,
            label_column=options.label_column,
        )  # fmt: skip
        key = repr(sorted(flags.items()))
        if key not in data_by_flags:
            data_by_flags[key] = _load(flags, options.dataset)
        _note(trained, data_by_flags[key].train)
        _note(held_out, data_by_flags[key].val)
    base = next(iter(data_by_flags.values()))
    for data in data_by_flags.values():
        if (data.image_column, data.label_column) != (base.image_column, base.label_column):
            raise UserError(
                "the members were trained on other columns of the data set: name those to compare "
                "them on, --image_column and --label_column"
            )
    for member in members:
        check_classes(member, base.classes, base.source)
    test = next((data.test for data in data_by_flags.values() if data.test is not None), None)
    role = options.split or ("test" if test is not None else "val")
    if role == "test" and test is not None:
        if test.name in trained:  # --train_split test, of a member's own
            raise UserError(f"a member was trained on split '{test.name}', which is to be scored")
        held_out.pop(test.name, None)
        scored, fitted = test, _common_val_split(held_out, trained, base.train.bit_depth)
        if fitted and len(fitted) < min(LEAST_FITTED, len(test) / 2):
            fitted = None
    else:
        scored, fitted = (
            None if role == "test" else _common_val_split(held_out, trained, base.train.bit_depth),
            None,
        )
    if scored is None:
        raise UserError(
            f"{base.source} has no split 'test': --split val" if role == "test" else
            f"{base.source} has no images that no member was trained on (nor a split 'test'): "
            "train with --val_fraction"
        )  # fmt: skip
    limit, seed, whole = options.max_eval_samples, options.seed, len(scored)
    scored, fitted = cut(scored, limit, seed), cut(fitted, limit, seed)
    if len(scored) < 2 and fitted is None:
        raise UserError("one image is scored, and none is left to fit anything on")
    return Images(scored, role, fitted, base.train, base.image_column, base.source, whole)


def _load(flags, other_dataset):
    """load_data, but another data set with a validation split of its own is not split again."""
    if other_dataset and flags.get("val_fraction"):
        data = load_data(**(flags | {"val_fraction": 0.0, "max_train_samples": None}))
        if data.val is not None:
            flags = flags | {"val_fraction": 0.0}
    return load_data(**flags)


def _note(labels_by_split, split):
    """Enter the labels of a split's images at their stored rows."""
    if split is None:
        return
    rows = stored_rows(split)
    dataset, labels = labels_by_split.get(split.name, (split.dataset, np.zeros(0, np.int64)))
    growth = max(0, rows.max() + 1 - len(labels))
    labels = np.pad(labels, (0, growth), constant_values=-1)
    labels[rows] = split.labels
    labels_by_split[split.name] = (dataset, labels)


def _common_val_split(held_out, trained, bit_depth):
    """The largest Split of validation images that no network was trained on."""
    best = None
    for name, (dataset, labels) in held_out.items():
        val_labels = labels.copy()
        if name in trained:
            train_labels = trained[name][1][: len(labels)]
            val_labels[: len(train_labels)][train_labels >= 0] = -1
        rows = np.flatnonzero(val_labels >= 0)
        if len(rows) >= 2 and (best is None or len(rows) > len(best)):
            best = Split(name, dataset, rows, val_labels[rows], bit_depth=bit_depth)
    return best

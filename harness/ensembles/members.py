"""The members of an ensemble: checked against each other, and which images may judge them."""

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
    """What the members are compared on."""

    scored: Split
    role: str  # of `scored`: "test" or "val"
    fitted: Split | None  # no member was trained on these; None: there are too few
    train: Split  # the first member's
    image_column: str
    source: str
    whole: int  # how many `scored` are without --max_eval_samples


def read_members(paths):
    """The Trained of each folder, with names that tell them apart.

    Raises UserError for none, for one given twice, for copies of one, and for members whose
    classes differ.
    """
    if not paths:
        raise UserError("give the folders of trained runs: ensemble_eval.py runs/a runs/b runs/c")
    places = [Path(path).resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{path} is a member twice: give it once, and --member_weights")
    members = [read_trained(path) for path in paths]
    for n, member in enumerate(members):
        check_classes(member, members[0].classes, members[0].folder)
        for other in members[:n]:
            if other.sha256 == member.sha256:
                raise UserError(f"{other.folder} and {member.folder} hold the same weights")
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


def find_images(members, args) -> Images:
    """The images that the members are scored on, and those that anything may be fitted on.

    Test is scored where there is one (or what --split says). Fitted on is what some member has
    held out for validation and no member, nor a network it came from, was trained on, unless it is
    too little: members of different seeds hold out different images. Raises UserError where there
    is nothing to score, and where a member was trained on images that would be scored.
    """
    own = [member.recipes[0] for member in members]
    places = {dataset_path(recipe) for recipe in own}
    if len(places) > 1 and not args.dataset:
        raise UserError(
            f"the members were trained on {' and '.join(sorted(places))}: say with --dataset what "
            "to compare them on"
        )
    loaded = {}
    trained, held_out = {}, {}  # stored split -> (its data set, labels by row, -1: not seen)
    for recipe in [recipe for member in members for recipe in member.recipes]:
        if "unknown" in recipe or dataset_path(recipe) not in places:
            continue  # a network that a member came from has seen other images
        flags = data_flags(
            recipe, dataset=args.dataset, image_column=args.image_column,
            label_column=args.label_column,
        )  # fmt: skip
        key = repr(sorted(flags.items()))
        if key not in loaded:
            loaded[key] = _load(flags, args.dataset)
        _note(trained, loaded[key].train)
        _note(held_out, loaded[key].val)
    first = next(iter(loaded.values()))
    for data in loaded.values():
        if (data.image_column, data.label_column) != (first.image_column, first.label_column):
            raise UserError(
                "the members were trained on other columns of the data set: name those to compare "
                "them on, --image_column and --label_column"
            )
    for member in members:
        check_classes(member, first.classes, first.source)
    test = next((data.test for data in loaded.values() if data.test is not None), None)
    role = args.split or ("test" if test is not None else "val")
    if role == "test" and test is not None:
        if test.name in trained:  # --train_split test, of a member's own
            raise UserError(f"a member was trained on split '{test.name}', which is to be scored")
        held_out.pop(test.name, None)
        scored, fitted = test, _honest(held_out, trained, first.train.bit_depth)
        if fitted and len(fitted) < min(LEAST_FITTED, len(test) / 2):
            fitted = None
    else:
        scored, fitted = (
            None if role == "test" else _honest(held_out, trained, first.train.bit_depth),
            None,
        )
    if scored is None:
        raise UserError(
            f"{first.source} has no split 'test': --split val" if role == "test" else
            f"{first.source} has no images that no member was trained on (nor a split 'test'): "
            "train with --val_fraction"
        )  # fmt: skip
    limit, whole = args.max_eval_samples, len(scored)
    scored, fitted = cut(scored, limit, args.seed), cut(fitted, limit, args.seed)
    if len(scored) < 2 and fitted is None:
        raise UserError("one image is scored, and none is left to fit anything on")
    return Images(scored, role, fitted, first.train, first.image_column, first.source, whole)


def _load(flags, elsewhere):
    """load_data; another data set that has a validation split of its own is not split again."""
    if elsewhere and flags.get("val_fraction"):
        data = load_data(**(flags | {"val_fraction": 0.0, "max_train_samples": None}))
        if data.val is not None:
            flags = flags | {"val_fraction": 0.0}
    return load_data(**flags)


def _note(seen, split):
    """Put the labels of a split's images where `seen` has its stored rows."""
    if split is None:
        return
    rows = stored_rows(split)
    dataset, labels = seen.get(split.name, (split.dataset, np.zeros(0, np.int64)))
    more = max(0, rows.max() + 1 - len(labels))
    labels = np.pad(labels, (0, more), constant_values=-1)
    labels[rows] = split.labels
    seen[split.name] = (dataset, labels)


def _honest(held_out, trained, bit_depth):
    """The largest Split of images that are in a validation split and that nobody was trained on."""
    best = None
    for name, (dataset, labels) in held_out.items():
        honest = labels.copy()
        if name in trained:
            used = trained[name][1][: len(labels)]
            honest[: len(used)][used >= 0] = -1
        rows = np.flatnonzero(honest >= 0)
        if len(rows) >= 2 and (best is None or len(rows) > len(best)):
            best = Split(name, dataset, rows, honest[rows], bit_depth=bit_depth)
    return best

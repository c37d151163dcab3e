"""K runs of --fold 1/K … K/K as one: every image of train is scored by the run that held it out."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from harness.console import words_of
from harness.data.parts import parse_fold
from harness.data.sources import Split, load_data, stored_rows
from harness.data.stores import Samples
from harness.errors import UserError
from harness.metrics import wilson_interval
from harness.models.trained import check_classes, data_flags, dataset_path
from harness.reports import training as report

# Flags that must be the same in all runs, for their parts to be those of one split
SHARED = ("dataset", "seed", "group_column", "group_pattern", "max_train_samples")


class Fold(NamedTuple):
    """A run and the images that it held out."""

    number: int  # from 1
    member: object  # harness.models.trained.Trained
    split: Split
    image_column: str


def check_flags(given, tta):
    """Raise UserError for flags that have no effect on a cross-validation, which combines nothing.

    given: see Parser.read. tta: of the flag.
    """
    for name in ("member_weights", "average", "soup", "max_eval_samples"):
        if name in given:
            flag = "no_soup" if name == "soup" else name
            raise UserError(
                f"--{flag} has no effect on the folds of a cross-validation: each run scores the "
                "images that it held out (--split test compares them on the test images)"
            )
    if len(words_of(tta)) > 1:
        raise UserError(f"--tta {tta}: the folds of a cross-validation take one kind of views")


def find_folds(members, options) -> list[Fold]:
    """The folds of members that form a cross-validation, in order; [] where they form none.

    options: SplitOptions. They form one where each was trained with a --fold, unless --split is
    test, or some folds are missing and there is a test split to compare the members on. Raises
    UserError for folds that are missing, given twice or of different splits.
    """
    recipes = [member.recipes[0] for member in members]
    if not all(recipe.get("fold") for recipe in recipes) or options.split == "test":
        return []
    data_sets = [
        load_data(
            **data_flags(
                recipe, dataset=options.dataset, image_column=options.image_column,
                label_column=options.label_column,
            )
        )
        for recipe in recipes
    ]  # fmt: skip
    numbers = [parse_fold(recipe["fold"]) for recipe in recipes]
    folds = max(count for _, count in numbers)
    absent = sorted(set(range(folds)) - {number for number, _ in numbers})
    if absent and options.split is None and data_sets[0].test is not None:
        return []
    for name in SHARED:
        values = [recipe.get(name) for recipe in recipes]
        if len(set(map(str, values))) > 1 and not (name == "dataset" and options.dataset):
            raise UserError(
                f"these runs are folds of different splits: {name} is {values[0]} in "
                f"{members[0].name}, other in another"
            )
    if len({count for _, count in numbers}) > 1:
        counts = sorted({count for _, count in numbers})
        raise UserError(f"these runs are folds of {' and of '.join(map(str, counts))}")
    if absent or len(numbers) > folds:
        fractions = ", ".join(f"{k + 1}/{folds}" for k in absent)
        raise UserError(
            f"a cross-validation needs each fold once: {fractions or 'one was given twice'}"
            f"{' is missing' if absent else ''}"
        )
    for member, data in zip(members, data_sets, strict=True):
        check_classes(member, data.classes, data.source)
        recipe_of_run, *ancestors = member.recipes
        if any(
            "unknown" not in recipe and dataset_path(recipe) == dataset_path(recipe_of_run)
            for recipe in ancestors
        ):
            raise UserError(
                f"{member.name} started from a run on the same images, which has seen what this "
                "one held out"
            )
    unsorted = [
        Fold(number + 1, member, data.val, data.image_column)
        for (number, _), member, data in zip(numbers, members, data_sets, strict=True)
    ]
    return sorted(unsorted, key=lambda fold: fold.number)


def joined(folds) -> Split:
    """The held-out parts of all folds as one split, in their order."""
    first_split = folds[0].split
    if first_split.stored is not None:
        raise UserError("folds cut by --max_eval_samples are incomplete: they can't be joined")
    return replace(
        first_split,
        rows=np.concatenate([fold.split.rows for fold in folds]),
        labels=np.concatenate([fold.split.labels for fold in folds]),
    )


def facts(name, folds, samples, logits, classes):
    """(the content of report.json, Samples of all folds). samples, logits: one of each fold."""
    split = joined(folds)
    all_samples = Samples(
        samples[0].stored, torch.from_numpy(split.rows), torch.from_numpy(split.labels)
    )
    report_facts = report.facts(
        name, "out-of-fold", split, all_samples, folds[0].image_column, classes, torch.cat(logits)
    )  # fmt: skip
    rows = []
    for fold, fold_logits in zip(folds, logits, strict=True):
        hits = int((fold_logits.argmax(1) == torch.from_numpy(fold.split.labels)).sum())
        total = len(fold.split)
        rows.append(
            {
                "fold": f"{fold.number}/{len(folds)}",
                "run": fold.member.name,
                "images": total,
                "accuracy": hits / total,
                "interval": wilson_interval(hits, total),
            }
        )
    assert len(np.unique(stored_rows(split))) == len(split), "an image is in two folds"
    return report_facts | {"folds": rows}, all_samples

"""Sets of classes with a guarantee: the threshold of `--coverage`, from held-out images.

The guarantee is that of split conformal prediction (tricks/conformal.py): over draws of the
held-out images and of the image that is asked about, the set holds its class at least so often.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch

from harness.data.options import SplitOptions
from harness.ensembles import members
from harness.errors import UserError
from harness.inference.images import of_dataset
from harness.inference.probabilities import probabilities_of
from tricks.conformal import aps_scores, calibrate_threshold, lac_scores

SCORES = {"threshold": lac_scores, "adaptive": aps_scores}  # of --sets


class Sets(NamedTuple):
    """How the set of an image follows from its probabilities."""

    kind: str
    coverage: float
    threshold: float
    source: str  # which images it was fitted on, in words
    images: int

    def of(self, probabilities) -> list[list[int]]:
        """The classes of each image's set, the likeliest first. probabilities: (n, classes)."""
        inside = SCORES[self.kind](probabilities.double()) <= self.threshold
        order = probabilities.argsort(dim=1, descending=True, stable=True)
        return [
            [k for k in row if chosen[k]]
            for row, chosen in zip(order.tolist(), inside.tolist(), strict=True)
        ]


def fit_sets(accelerator, networks, runs, kind, coverage, seed, progress) -> Sets:
    """The Sets of `--sets` (kind) and `--coverage`. progress: images -> a bar.

    Fitted on images that no run was trained on: those held out for validation where there are
    enough, else the test split. Raises UserError where there are too few to promise so much.
    """
    found = members.find_images(runs, SplitOptions(seed=seed))
    split = found.fitted or found.scored
    alpha = 1 - Fraction(str(coverage))  # in floats 1 - 0.95 is a little more than 0.05
    need = math.ceil(1 / alpha) - 1
    if len(split) < need:
        raise UserError(
            f"--coverage {coverage} wants at least {need:,} held-out images, and there are "
            f"{len(split):,}"
        )
    images = of_dataset(
        split.dataset, found.image_column, split.rows, torch.from_numpy(split.labels),
        split.name, split.bit_depth,
    )  # fmt: skip
    with progress(len(images)) as bar:
        rows, _ = probabilities_of(
            accelerator, networks, images, lambda _, mean: list(mean.unbind()), bar
        )
    good = [k for k, row in enumerate(rows) if row is not None]
    probabilities = torch.stack([rows[k] for k in good]).double()
    scores = SCORES[kind](probabilities)
    threshold = calibrate_threshold(scores, images.labels[good], float(alpha))
    if math.isinf(threshold):
        raise UserError(f"--coverage {coverage}: {len(good):,} held-out images are too few")
    word = (
        "held out of train" if found.fitted or found.role == "val" else f"of split '{split.name}'"
    )
    return Sets(kind, coverage, threshold, f"images {word}", len(good))

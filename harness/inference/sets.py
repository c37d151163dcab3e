"""Sets of classes with a guarantee: the threshold of `--coverage`, from held-out images.

The guarantee is that of split conformal prediction (tricks/conformal.py): over draws of the
held-out images and of a new image, the set holds the class of the new image at least as often as
--coverage says.
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
    source: str  # the images that the threshold was fitted on, as text
    images: int  # how many those are

    def of(self, probabilities) -> list[list[int]]:
        """The classes of each image's set, the likeliest first. probabilities: (n, classes)."""
        masks = SCORES[self.kind](probabilities.double()) <= self.threshold
        order = probabilities.argsort(dim=1, descending=True, stable=True)
        return [
            [k for k in row if mask[k]]
            for row, mask in zip(order.tolist(), masks.tolist(), strict=True)
        ]


def fit_sets(accelerator, networks, runs, kind, coverage, seed, progress) -> Sets:
    """The Sets of `--sets` (kind) and `--coverage`. progress: images -> a bar.

    Fitted on images that no run was trained on: those held out for validation where there are
    enough, else the test split. Raises UserError where there are too few for this coverage.
    """
    image_splits = members.find_images(runs, SplitOptions(seed=seed))
    split = image_splits.fitted or image_splits.scored
    alpha = 1 - Fraction(str(coverage))  # in floats 1 - 0.95 is a little more than 0.05
    least_images = math.ceil(1 / alpha) - 1
    if len(split) < least_images:
        raise UserError(
            f"--coverage {coverage} needs at least {least_images:,} held-out images, and there are "
            f"{len(split):,}"
        )
    images = of_dataset(
        split.dataset, image_splits.image_column, split.rows, torch.from_numpy(split.labels),
        split.name, split.bit_depth,
    )  # fmt: skip
    with progress(len(images)) as bar:
        rows, _ = probabilities_of(
            accelerator, networks, images, lambda _, mean: list(mean.unbind()), bar
        )
    readable = [k for k, row in enumerate(rows) if row is not None]
    probabilities = torch.stack([rows[k] for k in readable]).double()
    scores = SCORES[kind](probabilities)
    threshold = calibrate_threshold(scores, images.labels[readable], float(alpha))
    if math.isinf(threshold):
        raise UserError(f"--coverage {coverage}: {len(readable):,} held-out images are too few")
    source = f"images of split '{split.name}'"
    if image_splits.fitted or image_splits.role == "val":
        source = "images held out of train"
    return Sets(kind, coverage, threshold, source, len(readable))

"""Which images an export is checked on: held-out ones of the run, else made-up ones."""

from __future__ import annotations

from typing import NamedTuple

import torch

from harness.counters import generator
from harness.data.options import SplitOptions
from harness.ensembles import members
from harness.errors import UserError
from harness.inference.images import of_dataset
from harness.inference.probabilities import evaluation_pixels_of
from harness.reports.sections import percent

CHECKED = 512  # images, at most
CALIBRATED = 128  # of train, that the ranges of int8 are measured on
BATCH = 64


class CheckImages(NamedTuple):
    """Batches of uint8 pixels (n, 3, S, S) as the network sees them."""

    batches: list[torch.Tensor]
    labels: torch.Tensor | None  # int64 (n,), of all batches
    calibration: list[torch.Tensor]  # of other images, for int8
    source: str  # for the plan

    def check_drop(self, theirs, ours, precision, most):
        """Raise UserError where accuracy drops by more than `most` points; else print both.

        theirs and ours: probabilities (n, classes). Without labels, agreement with fp32 is judged.
        """
        same = (theirs.argmax(1) == ours.argmax(1)).double().mean().item()
        if self.labels is None:
            drop = 100 * (1 - same)
            words = f"{percent(same)} % of the images get the class of fp32"
        else:
            before, after = (
                (p.argmax(1) == self.labels).double().mean().item() for p in (ours, theirs)
            )
            drop = 100 * (before - after)
            words = f"accuracy {percent(after)} %, in fp32 {percent(before)} %; "
            words += f"{percent(same)} % get the same class"
        print(f"{precision:<12} {words}")
        if drop > most:
            raise UserError(
                f"{precision} loses {drop:.2f} points, over --max_accuracy_drop {most:g}: not "
                "written"
            )


def check_images(trained, dataset, seed, int8) -> CheckImages:
    """Held-out images of the run, with labels, where its data set is there; else noise and waves.

    trained: harness.models.trained.Trained. dataset: of the flag, or None for the run's. int8:
    whether images of train are wanted, to measure ranges on.
    """
    options = SplitOptions(dataset=dataset, max_eval_samples=CHECKED, seed=seed)
    try:
        found = members.find_images([trained], options)
    except (UserError, OSError) as error:
        if dataset:
            raise
        batches = _made_up(trained.preprocessing.size, seed)
        count = sum(map(len, batches))
        words = f"{count} made-up images: {str(error).splitlines()[0]}"
        return CheckImages(batches, None, batches, words)

    def read(split, most):
        rows = split.rows[:most]
        images = of_dataset(split.dataset, found.image_column, rows, None, "", split.bit_depth)
        return evaluation_pixels_of(images, trained.preprocessing)

    pixels, kept = read(found.scored, CHECKED)
    order = torch.randperm(len(found.train), generator=generator(seed, "export"))
    some = found.train.__class__(
        found.train.name, found.train.dataset, found.train.rows[order[:CALIBRATED].numpy()],
        found.train.labels[order[:CALIBRATED].numpy()], bit_depth=found.train.bit_depth,
    )  # fmt: skip
    calibration = read(some, CALIBRATED)[0] if int8 else pixels
    labels = torch.from_numpy(found.scored.labels)[kept]
    words = f"{len(pixels):,} {found.role} images of {found.source}"
    return CheckImages(list(pixels.split(BATCH)), labels, list(calibration.split(BATCH)), words)


def _made_up(size, seed):
    """64 images: noise at several scales, so that edges and even parts are there."""
    rng, images = generator(seed, "export"), []
    for side in (2, 4, 8, size):
        noise = torch.rand(16, 3, side, side, generator=rng)
        grown = torch.nn.functional.interpolate(noise, size=size, mode="bilinear")
        images.append((grown * 255).byte())
    return list(torch.cat(images).split(BATCH))

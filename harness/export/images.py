"""The images that an export is checked on: held-out ones of the run, else made-up ones."""

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
CALIBRATED = 128  # of train, to measure the ranges of int8 on
BATCH = 64


class CheckImages(NamedTuple):
    """Batches of uint8 pixels (n, 3, S, S) as the network sees them."""

    batches: list[torch.Tensor]
    labels: torch.Tensor | None  # int64 (n,), of all batches
    calibration: list[torch.Tensor]  # of other images, for int8
    source: str  # for the plan

    def check_drop(self, exported, reference, precision, limit):
        """Raise UserError where accuracy drops by more than `limit` points; else print both.

        exported, reference: probabilities (n, classes), the latter in fp32. Without labels, their
        agreement counts instead of the accuracy.
        """
        agreement = (exported.argmax(1) == reference.argmax(1)).double().mean().item()
        if self.labels is None:
            drop = 100 * (1 - agreement)
            text = f"{percent(agreement)} % of the images get the class of fp32"
        else:
            reference_accuracy, accuracy = (
                (p.argmax(1) == self.labels).double().mean().item() for p in (reference, exported)
            )
            drop = 100 * (reference_accuracy - accuracy)
            text = f"accuracy {percent(accuracy)} %, in fp32 {percent(reference_accuracy)} %; "
            text += f"{percent(agreement)} % get the same class"
        print(f"{precision:<12} {text}")
        if drop > limit:
            raise UserError(
                f"{precision} loses {drop:.2f} points, over --max_accuracy_drop {limit:g}: not "
                "written"
            )


def check_images(trained, dataset, seed, int8) -> CheckImages:
    """Held-out images of the run, with labels, if its data set can be read; else made-up ones.

    trained: harness.models.trained.Trained. dataset: of the flag, or None for the run's. int8:
    whether images of train are wanted, to measure ranges on.
    """
    options = SplitOptions(dataset=dataset, max_eval_samples=CHECKED, seed=seed)
    try:
        check_set = members.find_images([trained], options)
    except (UserError, OSError) as error:
        if dataset:
            raise
        batches = _made_up(trained.preprocessing.size, seed)
        count = sum(map(len, batches))
        source = f"{count} made-up images: {str(error).splitlines()[0]}"
        return CheckImages(batches, None, batches, source)

    def read_pixels(split, limit):
        rows = split.rows[:limit]
        images = of_dataset(split.dataset, check_set.image_column, rows, None, "", split.bit_depth)
        return evaluation_pixels_of(images, trained.preprocessing)

    pixels, decoded = read_pixels(check_set.scored, CHECKED)
    train = check_set.train
    order = torch.randperm(len(train), generator=generator(seed, "export"))[:CALIBRATED].numpy()
    calibration_split = train.__class__(
        train.name, train.dataset, train.rows[order], train.labels[order], bit_depth=train.bit_depth
    )
    calibration = read_pixels(calibration_split, CALIBRATED)[0] if int8 else pixels
    labels = torch.from_numpy(check_set.scored.labels)[decoded]
    source = f"{len(pixels):,} {check_set.role} images of {check_set.source}"
    return CheckImages(list(pixels.split(BATCH)), labels, list(calibration.split(BATCH)), source)


def _made_up(size, seed):
    """64 images of noise at several scales, so that they have edges and even areas."""
    rng, images = generator(seed, "export"), []
    for side in (2, 4, 8, size):
        noise = torch.rand(16, 3, side, side, generator=rng)
        grown = torch.nn.functional.interpolate(noise, size=size, mode="bilinear")
        images.append((grown * 255).byte())
    return list(torch.cat(images).split(BATCH))

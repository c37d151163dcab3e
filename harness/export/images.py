"""The images that an export is checked on: held-out ones of the run, else made-up ones."""

from __future__ import annotations

from argparse import Namespace
from typing import NamedTuple

import torch

from harness.counters import generator
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


def check_images(trained, args) -> CheckImages:
    """Held-out images of the run, with labels, if its data set can be read; else made-up ones.

    trained: harness.models.trained.Trained.
    """
    asked = Namespace(
        dataset=args.dataset, image_column=None, label_column=None, split=None,
        max_eval_samples=CHECKED, seed=args.seed,
    )  # fmt: skip
    try:
        found = members.find_images([trained], asked)
    except (UserError, OSError) as error:
        if args.dataset:
            raise
        batches = _made_up(trained.preprocessing.size, args.seed)
        count = sum(map(len, batches))
        words = f"{count} made-up images: {str(error).splitlines()[0]}"
        return CheckImages(batches, None, batches, words)

    def read(split, most):
        rows = split.rows[:most]
        images = of_dataset(split.dataset, found.image_column, rows, None, "", split.bit_depth)
        return evaluation_pixels_of(images, trained.preprocessing)

    pixels, kept = read(found.scored, CHECKED)
    order = torch.randperm(len(found.train), generator=generator(args.seed, "export"))
    some = found.train.__class__(
        found.train.name, found.train.dataset, found.train.rows[order[:CALIBRATED].numpy()],
        found.train.labels[order[:CALIBRATED].numpy()], bit_depth=found.train.bit_depth,
    )  # fmt: skip
    calibration = read(some, CALIBRATED)[0] if args.precision == "int8" else pixels
    labels = torch.from_numpy(found.scored.labels)[kept]
    words = f"{len(pixels):,} {found.role} images of {found.source}"
    return CheckImages(list(pixels.split(BATCH)), labels, list(calibration.split(BATCH)), words)


def _made_up(size, seed):
    """64 images of noise at several scales, so that they have edges and even areas."""
    rng, images = generator(seed, "export"), []
    for side in (2, 4, 8, size):
        noise = torch.rand(16, 3, side, side, generator=rng)
        grown = torch.nn.functional.interpolate(noise, size=size, mode="bilinear")
        images.append((grown * 255).byte())
    return list(torch.cat(images).split(BATCH))

"""`load_run`: use a trained run in a program of your own."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import torch

from harness.data.stores import evaluation_image
from harness.models.calibration import read_calibration
from harness.models.trained import load_model, read_trained
from tricks.augment import normalize_batch
from tricks.tta import tta_views


class Run(NamedTuple):
    """What `load_run` gives; the first three are what most programs want.

    model: nn.Module in eval mode, (n, 3, S, S) -> logits (n, classes). preprocess: a path, a binary
    file object or a PIL image -> float32 (1, 3, S, S), as in evaluation. classes: names in the
    order of the logits. temperature: divide logits by it before a softmax; 1.0 where none was
    fitted.
    """

    model: torch.nn.Module
    preprocess: Any
    classes: list[str]
    temperature: float


def load_run(folder) -> Run:
    """The network of a run folder on the CPU. Raises UserError for any other folder."""
    trained = read_trained(folder)
    preprocessing, calibration = trained.preprocessing, read_calibration(trained)
    (view,) = tta_views("none", preprocessing.size)

    def preprocess(image):
        if hasattr(image, "save"):  # a PIL image
            file = io.BytesIO()
            image.save(file, "PNG" if image.mode not in ("CMYK", "YCbCr", "HSV", "LAB") else "TIFF")
            image = io.BytesIO(file.getvalue())
        pixels = evaluation_image(image, preprocessing, trained.recipes[0].get("bit_depth"))
        pixels = view.apply(pixels.unsqueeze(0), torch.zeros(1, dtype=torch.int64))
        return normalize_batch(pixels, preprocessing.mean, preprocessing.std)

    temperature = calibration["temperature"] if calibration else 1.0
    return Run(load_model(trained), preprocess, trained.classes, temperature)

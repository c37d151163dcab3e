"""calibration.json of a run: the temperature of its probabilities, fitted on held-out images.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, https://arxiv.org/abs/1706.04599
"""

from __future__ import annotations

import hashlib
import json
import math

from harness.errors import UserError
from harness.files import has_file, replace_file
from harness.models.trained import add_to_folder
from tricks.calibration import expected_calibration_error, fit_temperature

FILE = "calibration.json"
LEAST = 50  # images that a temperature is fitted on


def fit_calibration(logits, labels, source) -> dict | None:
    """The facts of calibration.json, without the weights' hash, from logits (n, classes).

    source: the name of the images ("val"), which the network was not trained on. Returns None for
    fewer than LEAST images, and for logits that are not finite.
    """
    if len(labels) < LEAST or not logits.isfinite().all():
        return None
    logits = logits.double()
    temperature = fit_temperature(logits, labels)
    ece_before, ece_after = (
        expected_calibration_error((logits / t).softmax(1), labels) for t in (1.0, temperature)
    )
    return {
        "temperature": temperature,
        "images": len(labels),
        "source": source,
        "ece_before": ece_before,
        "ece_after": ece_after,
    }


def write_calibration(folder, facts):
    """Write calibration.json beside the weights that it is for."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    data = json.dumps({**facts, "weights_sha256": digest}, indent=1) + "\n"
    replace_file(folder / FILE, data.encode())


def keep_temperature(run, logits, labels, source):
    """Write the temperature of a finished run, unless it has one of as many held-out images.

    The folder is locked meanwhile: a run that goes on there keeps its own temperature. Where the
    folder can't be written, a note on the terminal says so.
    """
    current = read_calibration(run)
    facts = fit_calibration(logits, labels, source)
    if facts is None or (current and current.get("images", 0) >= facts["images"]):
        return
    failure = f"the temperature of {run.name} is not kept"
    add_to_folder(run, lambda: write_calibration(run.folder, facts), failure)


def read_calibration(run) -> dict | None:
    """What a run's calibration.json says; None for no file, or one of other weights.

    run: harness.models.trained.Trained. Raises UserError for a damaged file.
    """
    file = run.folder / FILE
    if not has_file(file):
        return None
    try:
        facts = json.loads(file.read_bytes())
        temperature = float(facts["temperature"])
        sane = math.isfinite(temperature) and temperature > 0
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        facts, sane = {}, False
    if not sane:
        raise UserError(f"{file} holds no temperature: remove it, or restore it")
    return facts if facts.get("weights_sha256") == run.sha256 else None

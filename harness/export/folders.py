"""A run as a folder for timm and the Hub: weights, and a config.json with timm's keys; checked."""

from __future__ import annotations

import json
import shutil

import torch

from harness.errors import UserError, first_line
from harness.files import replace_file
from tricks.augment import normalize_batch


def write_timm(run, folder, logits, pixels):
    """Write model.safetensors and config.json; returns by how much timm's logits differ at most.

    logits: of the run's network in fp32 for pixels, uint8 (n, 3, S, S). Raises UserError where
    timm can't load the folder or gives other logits.
    """
    import timm

    config = json.loads((run.folder / "config.json").read_text())
    keys = ("architecture", "num_classes", "label_names", "pretrained_cfg", "model_args")
    config = {name: config[name] for name in keys if name in config}
    config["num_features"] = None
    config["label_descriptions"] = {name: name for name in run.classes}
    shutil.copyfile(run.folder / "model.safetensors", folder / "model.safetensors")
    replace_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        config["num_features"] = model.num_features
        replace_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        preprocessing = run.preprocessing
        with torch.inference_mode():
            timm_logits = model(normalize_batch(pixels, preprocessing.mean, preprocessing.std))
    except Exception as error:
        raise UserError(
            f"timm can't load {run.config['architecture']} from this run: {first_line(error)} "
            "(it can load timm's networks, and torchvision's ResNets with the standard stem and a "
            "linear head)"
        ) from None
    difference = (timm_logits - logits).abs().max().item()
    if not difference < 1e-3:
        raise UserError(f"timm's network gives other logits: one differs by {difference:.2g}")
    return difference

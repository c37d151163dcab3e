"""A run as a folder for timm and the Hub: weights and config.json in timm's words, checked."""

from __future__ import annotations

import json
import shutil

import torch

from harness.errors import UserError, first_line
from harness.files import replace_file
from tricks.augment import normalize_batch


def write_timm(trained, folder, logits, pixels):
    """model.safetensors and config.json, which timm loads and answers alike; UserError if not.

    logits: of the run's network in fp32 for pixels, uint8 (n, 3, S, S).
    """
    import timm

    config = json.loads((trained.folder / "config.json").read_text())
    kept = ("architecture", "num_classes", "label_names", "pretrained_cfg", "model_args")
    config = {name: config[name] for name in kept if name in config}
    config["num_features"] = None
    config["label_descriptions"] = {name: name for name in trained.classes}
    shutil.copyfile(trained.folder / "model.safetensors", folder / "model.safetensors")
    replace_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        config["num_features"] = model.num_features
        replace_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        preprocessing = trained.preprocessing
        with torch.inference_mode():
            theirs = model(normalize_batch(pixels, preprocessing.mean, preprocessing.std))
    except Exception as error:
        raise UserError(
            f"timm can't load {trained.config['architecture']} from this run: {first_line(error)} "
            "(networks of timm, and torchvision's ResNets with their standard stem and a linear "
            "head, it can)"
        ) from None
    off = (theirs - logits).abs().max().item()
    if not off < 1e-3:
        raise UserError(f"timm's network answers otherwise: a logit differs by {off:.2g}")
    return off

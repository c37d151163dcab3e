"""The bounds of numbers in flags: one table for the command line, recipes and config.json.

They catch a mistake before any work begins: nobody should ever need a value outside them. A flag
refers to its line here by its name: `type=BOUNDS["lr"]`.
"""

from __future__ import annotations

import argparse
import math

from harness.errors import shortened


def integer(low, high):
    """An argparse type: an integer in [low, high]."""
    range_text = f"a whole number at least {low} and at most {high}"

    def convert(text):
        value = int(_in_plain_digits(text))
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shortened(text)} is not {range_text}")
        return value

    convert.__name__, convert.range_text = "whole number", range_text
    return convert


def _in_plain_digits(text):
    """The text; ValueError for 1_000 and digits of other scripts, which Python would accept."""
    if "_" in text or not text.isascii():
        raise ValueError(f"{text} is not in plain digits")
    return text


def number(low=None, high=math.inf, above=None, zero=False, hint=""):
    """An argparse type: a finite float in [low, high], or greater than `above`.

    zero: 0 is allowed, too, where it is below `low`: it means off. hint: added to the bounds in
    errors.
    """

    bounds = [f"above {above}"] if above is not None else []
    bounds += [f"at least {low}"] if low is not None else []
    bounds += [f"at most {high}"]
    zero_text, hint_text = "0, or " if zero else "", f" ({hint})" if hint else ""
    range_text = f"a number {zero_text}{' and '.join(bounds)}{hint_text}"

    def convert(text):
        value = float(_in_plain_digits(text))
        in_range = math.isfinite(value) and (low is None or low <= value) and value <= high
        in_range = in_range and (above is None or value > above)
        if not in_range and not (zero and value == 0):
            raise argparse.ArgumentTypeError(f"{shortened(text)} is not {range_text}")
        return value

    convert.__name__, convert.range_text = "number", range_text
    return convert


def integer_or(*choices, low=1, high):
    """An argparse type: one of `choices`, or an integer in [low, high]."""

    def convert(text):
        return text if text in choices else integer(low, high)(text)

    convert.__name__ = f"{' or '.join(choices)} or whole number"
    return convert


MANY = 1_000_000_000  # steps, images: large counts cost nothing by themselves
RATE = number(above=0, high=10_000)  # the largest in use, of biases, is 283
BETA = number(0.001, 1000, zero=True)  # beyond, Beta(α, α) draws only the ends, or the middle
DECAY = number(0, 1000)
SCALE = "pixels are in [0, 1]: divide by 255"
PROBABILITY = number(0, 1)

BOUNDS = {
    # data
    "bit_depth": integer(9, 16),
    "val_fraction": number(0, 0.9),
    "max_train_samples": integer(1, MANY),
    "max_eval_samples": integer(1, MANY),
    # model
    "image_size": integer(4, 4096),
    "dropout": number(0, 0.99),
    "num_classes": integer(1, 1_000_000),  # of a config.json
    "crop_pct": number(0.25, 1),
    "mean": number(-1, 2, hint=SCALE),  # each; those published are 0 to 0.5
    "std": number(0.001, 2, hint=SCALE),  # each; those published are 0.1 to 1
    # transfer
    "layer_decay": number(above=0, high=1),
    "views": integer(0, 1000),
    # optimization
    "batch_size": integer(1, 1_000_000),
    "gradient_accumulation_steps": integer(1, 1_000_000),
    "epochs": integer(1, 1_000_000),
    "max_steps": integer(1, MANY),
    "lr": RATE,
    "head_lr": RATE,
    "bias_lr": RATE,
    "momentum": number(0, 0.9999),
    "weight_decay": DECAY,
    "norm_weight_decay": DECAY,
    "warmup_epochs": number(0, 1_000_000),
    "clip_grad_norm": number(0, 1e9),
    "ema_decay": number(0, 0.999999),
    "label_smoothing": number(0, 0.99),
    "imbalance_tau": number(0, 100),
    "start_size": integer(4, 4096),
    # augmentation
    "flip_prob": PROBABILITY,
    "crop_scale": number(0.001, 1, zero=True),
    "crop_padding": integer(0, 512),
    "randaugment_ops": integer(1, 20),
    "randaugment_magnitude": integer(0, 30),
    "random_erasing": PROBABILITY,
    "mixup_alpha": BETA,
    "cutmix_alpha": BETA,
    "mix_prob": PROBABILITY,
    # reports
    "member_weights": number(0, 1e9),  # each
    "indices": integer(0, MANY),  # each
    "max_images": integer(1, 100_000),
    "max_accuracy_drop": number(0, 100),
    "top_k": integer(1, 1000),
    "min_probability": PROBABILITY,
    "coverage": number(0.5, 0.9999),
    "alpha": PROBABILITY,
    # running
    "threads": integer(1, 512),  # no machine has more cores to give one process
    "seed": integer(0, 2**32 - 1),
    "logging_steps": integer(1, MANY),
    "eval_epochs": integer(1, MANY),
    "checkpointing_steps": integer_or("epoch", high=MANY),
    "max_checkpoints": integer(2, MANY),
    "stop_after": integer(1, MANY),
}


def range_of(name) -> str:
    """The bounds of a number in words: "a number at least 0 and at most 1"."""
    return BOUNDS[name].range_text


def fits(name, value) -> bool:
    """Whether a value of a JSON file is a number within the bounds of `name`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        BOUNDS[name](str(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return True

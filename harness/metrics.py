"""The table of metrics: what an evaluation computes, under which name, and what is better.

Records ("val/acc", "test/loss_ema"), the lines of epochs, the trackers' summaries, the curves and
the choice of the best epoch follow from it. To log one more number of an evaluation, add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Metric(NamedTuple):
    """A number of a split, the mean over its samples of what each is worth."""

    title: str  # in words, on pictures
    batch_sum: Callable[[Tensor, Tensor], Tensor]  # logits (n, m), labels (n,) -> 0-d, their sum
    best: str  # "max" or "min"
    text: str  # how a value is written


def _correct(logits, labels):
    return (logits.argmax(1) == labels).sum()


def _cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


METRICS = {
    "loss": Metric("loss", _cross_entropy, "min", "{:.4f}"),
    "acc": Metric("accuracy", _correct, "max", "{:.2%}"),
}
CHOSEN_BY = "acc"  # the best epoch is the one with the best value of this
SHOWN = ["acc"]  # in the line of an epoch


def batch_sums(logits, labels) -> Tensor:
    """What a batch adds to each metric, in the order of METRICS: float32 on the device."""
    return torch.stack([m.batch_sum(logits, labels).float() for m in METRICS.values()])


def is_better(value, than) -> bool:
    """Whether a value of CHOSEN_BY is better than another."""
    return value > than if METRICS[CHOSEN_BY].best == "max" else value < than


def scores_in_words(scores, sizes) -> str:
    """`test 93.10% (ema 94.02%) of 10,000  ` for the epoch line; empty if nothing was scored.

    scores: {"SPLIT/METRIC": value}. sizes: {split: images}.
    """
    words = ""
    for split in ("val", "test"):
        values = []
        for name in SHOWN:
            value, averaged = (scores.get(f"{split}/{name}{end}") for end in ("", "_ema"))
            if value is not None:
                text, label = METRICS[name].text, f"{name} " if len(SHOWN) > 1 else ""
                ema = f" (ema {text.format(averaged)})" if averaged is not None else ""
                values.append(f"{label}{text.format(value)}{ema}")
        words += f"{split} {', '.join(values)} of {sizes[split]:,}  " if values else ""
    return words

"""The table of metrics: what an evaluation computes, its name, and whether more is better.

Records ("val/acc", "test/loss_ema"), the lines of epochs, the trackers' summaries, the curves, the
choice of the best epoch (`--select_by`) and the names for `--metrics` follow from it. To log one
more number of an evaluation, add a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tricks.calibration import expected_calibration_error


class Metric(NamedTuple):
    """A number about a split, computed by `batch_sum` or by `of_all`; the other is None."""

    title: str  # on pictures and in reports
    best: str  # "max" or "min"
    text: str  # the format of a value
    # logits (n, K), labels (n,) -> 0-d: the value is the sum of these over the samples
    batch_sum: Callable[[Tensor, Tensor], Tensor] | None = None
    # All logits float64 (n, K), labels int64 (n,), on the CPU -> the value
    of_all: Callable[[Tensor, Tensor], float] | None = None


def _correct(logits, labels):
    return (logits.argmax(1) == labels).sum()


def _among_five(logits, labels):
    likeliest = logits.topk(min(5, logits.shape[1])).indices
    return (likeliest == labels.unsqueeze(1)).sum()


def _cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


def confusion(predicted, labels, classes) -> Tensor:
    """Counts (classes, classes), int64: rows are the true classes, columns the predicted ones.

    predicted and labels: int64 (n,). classes: how many there are.
    """
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def _confusion(logits, labels):
    return confusion(logits.argmax(1), labels, logits.shape[1])


def _balanced_accuracy(logits, labels):
    """The mean recall of the classes that have samples."""
    matrix = _confusion(logits, labels).double()
    has_samples = matrix.sum(1) > 0
    return (matrix.diag()[has_samples] / matrix.sum(1)[has_samples]).mean().item()


def _macro_f1(logits, labels):
    """The mean F1 of the classes that have samples or were predicted."""
    matrix = _confusion(logits, labels).double()
    totals = matrix.sum(1) + matrix.sum(0)
    occurs = totals > 0
    return (2 * matrix.diag()[occurs] / totals[occurs]).mean().item()


def _ece(logits, labels):
    return expected_calibration_error(logits.softmax(1), labels)


def _over_classes(score):
    """The mean over classes of `score`(whether each sample is of the class, its probability).

    A class that all samples belong to, or none, has no score; NaN where no class has one.
    """

    def value(logits, labels):
        probabilities, counts = logits.softmax(1), labels.bincount(minlength=logits.shape[1])
        scores = [
            score((labels == k).numpy(), probabilities[:, k].numpy())
            for k in ((counts > 0) & (counts < len(labels))).nonzero().flatten().tolist()
        ]
        return sum(scores) / len(scores) if scores else math.nan

    return value


def _auroc(is_class, probability):
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(is_class, probability))


def _average_precision(is_class, probability):
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(is_class, probability))


PERCENT = "{:.2%}"
METRICS = {
    "loss": Metric("loss", "min", "{:.4f}", _cross_entropy),
    "acc": Metric("accuracy", "max", PERCENT, _correct),
    "top5": Metric("top-5 accuracy", "max", PERCENT, _among_five),
    "balanced_acc": Metric("balanced accuracy", "max", PERCENT, None, _balanced_accuracy),
    "macro_f1": Metric("macro F1", "max", PERCENT, None, _macro_f1),
    "ece": Metric("expected calibration error", "min", PERCENT, None, _ece),
    "auroc": Metric("AUROC, macro", "max", PERCENT, None,
                    _over_classes(_auroc)),
    "ap": Metric("average precision, macro", "max", PERCENT, None,
                 _over_classes(_average_precision)),
}  # fmt: skip
ALWAYS = ("loss", "acc")  # besides what `--metrics` and `--select_by` name


def computed(metrics, select_by) -> list[str]:
    """The names that a run computes at each evaluation, in the order of the table.

    metrics: of the flag, or None. select_by: of the flag.
    """
    return [name for name in METRICS if name in {*ALWAYS, *(metrics or ()), select_by}]


def is_better(name, value, than) -> bool:
    """Whether a value of a metric is better than another; any number is better than NaN."""
    if math.isnan(than):
        return not math.isnan(value)
    return value > than if METRICS[name].best == "max" else value < than


def wilson_interval(hits, total, z=1.96):
    """(low, high) of a share of `hits` in `total` draws: Wilson's score interval.

    z: 1.96 for 95 %. Brown, Cai, DasGupta, "Interval Estimation for a Binomial Proportion", 2001.
    (0.0, 1.0) for total = 0.
    """
    if not total:
        return 0.0, 1.0
    share, z2 = hits / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def scores_in_words(scores, sizes) -> str:
    """`test 93.10% (ema 94.02%) of 10,000  ` for the epoch line; empty if nothing was scored.

    scores: {"SPLIT/METRIC": value}; losses are left to metrics.jsonl. sizes: {split: images}.
    """
    line = ""
    for split in ("val", "test"):
        names = [name for name in METRICS if name != "loss" and f"{split}/{name}" in scores]
        values = []
        for name in names:
            value, ema_value = (scores.get(f"{split}/{name}{end}") for end in ("", "_ema"))
            text, label = METRICS[name].text, f"{name} " if len(names) > 1 else ""
            ema = f" (ema {text.format(ema_value)})" if ema_value is not None else ""
            values.append(f"{label}{text.format(value)}{ema}")
        line += f"{split} {', '.join(values)} of {sizes[split]:,}  " if values else ""
    return line

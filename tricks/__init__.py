"""Training tricks, one a file, torch only. Import them, or copy one file into your own project."""

from .augment import (
    crop_batch,
    draw_crops,
    draw_erasing,
    draw_flips,
    draw_resized_crops,
    erase_batch,
    flip_batch,
    normalize_batch,
    resized_crop_batch,
)
from .autoaugment import (
    OPERATIONS,
    Ops,
    apply_ops,
    draw_autoaugment,
    draw_randaugment,
    draw_trivialaugment,
)
from .calibration import (
    Reliability,
    accuracy,
    brier,
    expected_calibration_error,
    fit_temperature,
    nll,
    reliability_table,
)
from .cutmix import box_around, cutmix_batch, draw_cutmix
from .ema import ModelEma, decay_at, half_life
from .ensemble import (
    average_logits,
    average_probabilities,
    crossfit,
    fit_weights,
    greedy_selection,
    majority_vote,
)
from .freeze import freeze_except, frozen_digest, unfreeze
from .init import kaiming_normal_
from .label_smoothing import smooth_labels, soft_cross_entropy
from .lr_groups import check_groups, layer_decay_rates, prefix_groups, weight_decay_groups
from .mixup import draw_mixup, mixup_batch, neighbour_pairs
from .schedule import set_lr, warmup_cosine
from .significance import (
    McNemar,
    bootstrap_interval,
    disagreement,
    error_correlation,
    mcnemar_exact,
    oracle_accuracy,
    paired_bootstrap_interval,
)
from .soup import greedy_soup, recompute_batch_norm, uniform_soup
from .tta import View, average_views, tta_views

__all__ = [
    "OPERATIONS",
    "McNemar",
    "ModelEma",
    "Ops",
    "Reliability",
    "View",
    "accuracy",
    "apply_ops",
    "average_logits",
    "average_probabilities",
    "average_views",
    "bootstrap_interval",
    "box_around",
    "brier",
    "check_groups",
    "crop_batch",
    "crossfit",
    "cutmix_batch",
    "decay_at",
    "disagreement",
    "draw_autoaugment",
    "draw_crops",
    "draw_cutmix",
    "draw_erasing",
    "draw_flips",
    "draw_mixup",
    "draw_randaugment",
    "draw_resized_crops",
    "draw_trivialaugment",
    "erase_batch",
    "error_correlation",
    "expected_calibration_error",
    "fit_temperature",
    "fit_weights",
    "flip_batch",
    "freeze_except",
    "frozen_digest",
    "greedy_selection",
    "greedy_soup",
    "half_life",
    "kaiming_normal_",
    "layer_decay_rates",
    "majority_vote",
    "mcnemar_exact",
    "mixup_batch",
    "neighbour_pairs",
    "nll",
    "normalize_batch",
    "oracle_accuracy",
    "paired_bootstrap_interval",
    "prefix_groups",
    "recompute_batch_norm",
    "reliability_table",
    "resized_crop_batch",
    "set_lr",
    "smooth_labels",
    "soft_cross_entropy",
    "tta_views",
    "unfreeze",
    "uniform_soup",
    "warmup_cosine",
    "weight_decay_groups",
]

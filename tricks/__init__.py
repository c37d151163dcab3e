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
from .cutmix import box_around, cutmix_batch, draw_cutmix
from .ema import ModelEma, decay_at, half_life
from .freeze import freeze_except, frozen_digest, unfreeze
from .init import kaiming_normal_
from .label_smoothing import smooth_labels, soft_cross_entropy
from .lr_groups import check_groups, layer_decay_rates, prefix_groups, weight_decay_groups
from .mixup import draw_mixup, mixup_batch, neighbour_pairs
from .schedule import set_lr, warmup_cosine

__all__ = [
    "OPERATIONS",
    "ModelEma",
    "Ops",
    "apply_ops",
    "box_around",
    "check_groups",
    "crop_batch",
    "cutmix_batch",
    "decay_at",
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
    "flip_batch",
    "freeze_except",
    "frozen_digest",
    "half_life",
    "kaiming_normal_",
    "layer_decay_rates",
    "mixup_batch",
    "neighbour_pairs",
    "normalize_batch",
    "prefix_groups",
    "resized_crop_batch",
    "set_lr",
    "smooth_labels",
    "soft_cross_entropy",
    "unfreeze",
    "warmup_cosine",
    "weight_decay_groups",
]

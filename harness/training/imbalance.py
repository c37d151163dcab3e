"""What `--imbalance` does about uneven classes: the loss of a batch, and a phrase for the plan.

The order of the epochs, which `balanced` and `sqrt` change, is in harness.data.batches.
"""

from __future__ import annotations

import torch

from harness.data.batches import SHARE_POWER
from harness.errors import UserError
from tricks.class_weights import inverse_frequency_weights, weighted_cross_entropy
from tricks.label_smoothing import soft_cross_entropy
from tricks.logit_adjustment import add_priors, log_priors


def make_loss(options, labels, classes, device):
    """(the loss function of `--imbalance`, the classes' shares for label smoothing or None).

    The function maps (logits (n, K), targets (n, K)) to the mean loss, a 0-d tensor. The shares,
    float32 (K,) on the device, are the `shares` of tricks.label_smoothing.

    options: BatchOptions. labels: int64 (N,), of all train images.
    """
    kind, tau = options.imbalance, options.imbalance_tau
    if kind not in ("logit_adjustment", "class_weights"):
        return soft_cross_entropy, None
    counts = torch.as_tensor(labels).bincount(minlength=classes)
    shares = (counts / counts.sum()).to(device)
    if kind == "class_weights":
        weights = inverse_frequency_weights(counts).to(device)
        return lambda logits, targets: weighted_cross_entropy(logits, targets, weights), shares
    priors = log_priors(counts).to(device)

    def adjusted(logits, targets):
        return soft_cross_entropy(add_priors(logits, priors, tau), targets)

    return adjusted, shares


def check_flags(kind, stages, flag_names, shard_store):
    """Raise UserError for flags that have no effect or can't be combined.

    kind: of `--imbalance`. stages: of `--stages`, or None. flag_names: of those that are not at
    their defaults. shard_store: of that flag.
    """
    kinds = {kind, *(stage.get("imbalance") for stage in stages or ())}
    if "imbalance_tau" in flag_names and "logit_adjustment" not in kinds:
        raise UserError(
            f"--imbalance_tau has no effect with --imbalance {kind}: it is for logit_adjustment"
        )
    if shard_store and kind in SHARE_POWER:
        raise UserError(
            f"--imbalance {kind} draws from all train images, but with --shard_store each "
            "machine has only a share of them: use --imbalance logit_adjustment"
        )


def describe(kind, tau) -> str:
    """What `--imbalance` (not "none") does, for the plan. tau: of logit adjustment."""
    return {
        "logit_adjustment": f"logit adjustment τ {tau:g}",
        "class_weights": "loss weighed by inverse class frequency",
        "balanced": "every class equally often",
        "sqrt": "classes by the square root of their images",
    }[kind]

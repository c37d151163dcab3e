"""What `--imbalance` does about uneven classes: the loss of a batch, and words for the plan.

The order of the epochs, which `balanced` and `sqrt` change, is in harness.data.batches.
"""

from __future__ import annotations

import torch

from harness.data.batches import SHARE_POWER
from harness.errors import UserError
from tricks.class_weights import inverse_frequency_weights, weighted_cross_entropy
from tricks.label_smoothing import soft_cross_entropy
from tricks.logit_adjustment import add_priors, log_priors


def make_loss(kind, tau, labels, classes, device):
    """(loss of a batch, what smoothed labels are spread over) for a word of `--imbalance`.

    The loss is a function (logits (n, K), targets (n, K)) -> its mean, a 0-d tensor. The other is
    the `shares` of tricks.label_smoothing, float32 (K,) on the device, or None.

    tau: τ of logit adjustment. labels: int64 (N,), of all train images.
    """
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


def check_flags(args):
    """Raise UserError for a combination of flags that would have no effect or can't be had."""
    kinds = {args.imbalance, *(s.get("imbalance") for s in getattr(args, "stages", None) or ())}
    if "imbalance_tau" in args.given and "logit_adjustment" not in kinds:
        raise UserError(
            f"--imbalance_tau has no effect with --imbalance {args.imbalance}: it is for "
            "logit_adjustment"
        )
    if getattr(args, "shard_store", False) and args.imbalance in SHARE_POWER:
        raise UserError(
            f"--imbalance {args.imbalance} orders all train images, with --shard_store each "
            "machine has a share: --imbalance logit_adjustment works there"
        )


def in_words(args) -> str:
    """What `--imbalance` does, for the plan."""
    return {
        "logit_adjustment": f"logit adjustment τ {args.imbalance_tau:g}",
        "class_weights": "loss weighed by inverse class frequency",
        "balanced": "every class equally often",
        "sqrt": "classes by the square root of their images",
    }[args.imbalance]

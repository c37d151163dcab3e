"""Linear warm-up, then a cosine or a line: the learning rate as a pure function of the step.

It has no state, so nothing has to be saved, and a resumed run has the rate of an uninterrupted one.

Warm-up: Goyal et al., "Accurate, Large Minibatch SGD", 2017, https://arxiv.org/abs/1706.02677
Cosine: Loshchilov and Hutter, "SGDR", ICLR 2017, https://arxiv.org/abs/1608.03983
Linear: Li et al., "Budgeted Training", ICLR 2020, https://arxiv.org/abs/1905.04753
"""

import math

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["set_lr", "warmup_cosine", "warmup_linear"]


def warmup_cosine(
    step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0
) -> float:
    """The factor in [0, 1] on the base learning rate for optimizer step `step`, counted from 0.

        s ≤ W:  (s + 1) / (W + 1)
        s > W:  f + (1 - f) · (1 + cos(π · (s - W) / (T - W))) / 2

    with s = `step`, T = `total_steps`, W = `warmup_steps`, f = `final_factor`. The peak, 1, is at
    s = W; f would be reached at s = T, just after the last step T - 1. So no step is wasted on a
    rate of 0, neither the first nor the last. It equals torch's
    `SequentialLR([LinearLR(1 / (W + 1), total_iters=W), CosineAnnealingLR(T - W)], [W])`.

    Raises ValueError unless 0 ≤ W ≤ T, 0 ≤ s ≤ T and 0 ≤ f ≤ 1.

    >>> [round(warmup_cosine(step, total_steps=8, warmup_steps=3), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 0.905, 0.655, 0.345, 0.095]
    """
    progress = _progress(step, total_steps, warmup_steps, final_factor)
    if progress <= 0:
        return 1 + progress
    return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2


def warmup_linear(
    step: int, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0
) -> float:
    """The factor in [0, 1] on the base learning rate: up along a line, and down along another.

        s ≤ W:  (s + 1) / (W + 1)
        s > W:  1 - (1 - f) · (s - W) / (T - W)

    Symbols, ends and errors are those of `warmup_cosine`. For runs of few epochs, in which a cosine
    spends too little time at small rates.

    >>> [round(warmup_linear(step, total_steps=8, warmup_steps=3), 3) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    progress = _progress(step, total_steps, warmup_steps, final_factor)
    return 1 + progress if progress <= 0 else 1 - (1 - final_factor) * progress


def _progress(step: int, total_steps: int, warmup_steps: int, final_factor: float) -> float:
    """The share of the way down, in (0, 1]; in warm-up, the factor minus 1, in (-1, 0]."""
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warm-up must be in [0, {total_steps}] steps, got {warmup_steps}")
    if not 0 <= step <= total_steps:
        raise ValueError(f"step must be in [0, {total_steps}], got {step}")
    if not 0 <= final_factor <= 1:
        raise ValueError(f"final_factor must be in [0, 1], got {final_factor}")
    if step <= warmup_steps:
        return (step + 1) / (warmup_steps + 1) - 1
    return (step - warmup_steps) / (total_steps - warmup_steps)


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set each parameter group's learning rate to `factor` times its base rate.

    The base is the group's "initial_lr", the key torch's own schedulers use; a group without one
    gets it from its "lr" now. Groups keep their ratios to each other. Call it before each step.
    A rate that is a tensor, as compiled and capturable optimizers have it, is set in place.

    Raises ValueError for a factor that is negative or not finite.

    >>> import torch
    >>> weights = [{"params": [torch.ones(1)], "lr": lr} for lr in (0.5, 0.25)]
    >>> optimizer = torch.optim.SGD(weights)
    >>> for factor in (0.5, 0.125):
    ...     set_lr(optimizer, factor)
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.0625, 0.03125]
    """
    if not 0 <= factor < math.inf:
        raise ValueError(f"the factor on the learning rate must be finite and ≥ 0, got {factor}")
    for group in optimizer.param_groups:  # all before the first is set: groups may share a tensor
        lr = group["lr"]
        group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
    for group in optimizer.param_groups:
        lr = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(lr)
        else:
            group["lr"] = lr

"""The parameter groups of train.py, and the optimizer of both training scripts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.models.heads import heads
from tricks.lr_groups import weight_decay_groups
from tricks.muon import Muon, muon_groups


@dataclass(frozen=True)
class OptimizerOptions:
    """The flags of the optimizer and of its learning rates."""

    optimizer: str
    lr: float | None  # peak rate; None: the stages of a fine-tune have their own
    momentum: float
    nesterov: bool
    weight_decay: float
    norm_weight_decay: float
    warmup_epochs: float
    head_lr: float | None = None  # of the head's kernel; None: lr
    bias_lr: float | None = None  # of norms and biases; None: lr
    schedule: str = "cosine"


def make_groups(model, options):
    """Parameter groups: kernels decay, norms and biases don't, each with a rate of its own.

    options: OptimizerOptions. The kernels that Muon orthogonalises have groups of their own.
    """
    lr, head_lr = options.lr, options.head_lr
    head_modules = torch.nn.ModuleList(module for _, module in heads(model))
    of_head = {id(p) for p in head_modules.parameters()}
    groups = []
    for group in weight_decay_groups(model, options.weight_decay, options.norm_weight_decay):
        if group["name"] == "norm_and_bias":
            groups.append(group | {"lr": options.bias_lr or lr})
            continue
        head = [p for p in group["params"] if head_lr and id(p) in of_head]
        body = [p for p in group["params"] if not head_lr or id(p) not in of_head]
        groups += [group | {"params": body, "lr": lr}] if body else []
        groups += [group | {"name": "head", "params": head, "lr": head_lr}] if head else []
    return muon_groups(groups, head_modules) if options.optimizer == "muon" else groups


def make_optimizer(options, parameters, accelerator, lr):
    """The optimizer of OptimizerOptions over parameters or groups, not yet prepared.

    torch's optimizers are fused on a GPU, except where a gradient scaler has to look at the
    gradients first (fp16). lr: of groups without one.
    """
    fused = True if accelerator.device.type == "cuda" and accelerator.scaler is None else None
    momentum = options.momentum
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, (momentum, 0.999), fused=fused)
    nesterov = options.nesterov and momentum > 0
    if options.optimizer == "muon":
        return Muon(parameters, lr, momentum, nesterov)
    return torch.optim.SGD(parameters, lr, momentum, nesterov=nesterov, fused=fused)


def withholds_on_device(optimizer, device):
    """Whether the device itself leaves out an update where the optimizer's `found_inf` is 1.

    Then the host need not know. Fused optimizers do so, and Muon on a GPU; on a CPU it would gain
    nothing.
    """
    fused = bool(optimizer.defaults.get("fused"))
    return fused or (isinstance(optimizer, Muon) and device.type == "cuda")

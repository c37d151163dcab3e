"""Parameter groups and optimizer of train.py's flags, and torch's optimizer of both scripts'."""

from __future__ import annotations

import torch

from harness.models.heads import heads
from tricks.lr_groups import weight_decay_groups
from tricks.muon import Muon, muon_groups


def make_groups(model, lr, head_lr, bias_lr, weight_decay, norm_weight_decay, muon):
    """Parameter groups: kernels decay, norms and biases don't, each with a rate of its own.

    head_lr: of the head's kernel, bias_lr: of norms and biases; None for lr. muon: whether what
    it orthogonalises has a group of its own.
    """
    last = torch.nn.ModuleList(module for _, module in heads(model))
    of_head = {id(p) for p in last.parameters()}
    groups = []
    for group in weight_decay_groups(model, weight_decay, norm_weight_decay):
        if group["name"] == "norm_and_bias":
            groups.append(group | {"lr": bias_lr or lr})
            continue
        own = [p for p in group["params"] if head_lr and id(p) in of_head]
        rest = [p for p in group["params"] if not head_lr or id(p) not in of_head]
        groups += [group | {"params": rest, "lr": lr}] if rest else []
        groups += [group | {"name": "head", "params": own, "lr": head_lr}] if own else []
    return muon_groups(groups, last) if muon else groups


def make_optimizer(args, parameters, accelerator, lr):
    """The optimizer of these flags over parameters or groups, not yet prepared.

    torch's are fused on a GPU, but where a gradient scaler has to look at the gradients first
    (fp16). lr: of the groups that have none of their own.
    """
    fused = True if accelerator.device.type == "cuda" and accelerator.scaler is None else None
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, (args.momentum, 0.999), fused=fused)
    nesterov = args.nesterov and args.momentum > 0
    if args.optimizer == "muon":
        return Muon(parameters, lr, args.momentum, nesterov)
    return torch.optim.SGD(parameters, lr, args.momentum, nesterov=nesterov, fused=fused)


def withholds_on_device(optimizer, device):
    """Whether it leaves out an update for which its `found_inf` is 1, without the host's knowledge.

    Fused optimizers do. Muon can; on a CPU, where nothing is gained by it, it need not.
    """
    fused = bool(optimizer.defaults.get("fused"))
    return fused or (isinstance(optimizer, Muon) and device.type == "cuda")

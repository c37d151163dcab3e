"""Parameter groups for the optimizer: which weights decay, and a check that none is forgotten.

No decay for norms and biases: He et al., "Bag of Tricks for Image Classification with
Convolutional Neural Networks", CVPR 2019, section 3.1, https://arxiv.org/abs/1812.01187
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["check_groups", "weight_decay_groups"]

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def weight_decay_groups(
    model: nn.Module, weight_decay: float, norm_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into those that decay and the norms and biases.

    Returns groups for any torch optimizer, each with "name", "params" and "weight_decay":
    "norm_and_bias" (`norm_weight_decay`) holds what is named bias, what belongs to a
    normalisation layer and what has at most one dimension; "weight" (`weight_decay`) the rest:
    the kernels and matrices, and, as in torchvision's `set_weight_decay`, a transformer's class
    token and position embeddings. Each trainable parameter is in exactly one group, a tied one
    under its first name; frozen ones are left out, and so is a group that would be empty.

    Raises ValueError for a decay that is negative or not finite, and where nothing is trainable.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> for group in weight_decay_groups(model, 5e-4):
    ...     print(group["name"], len(group["params"]), group["weight_decay"])
    weight 1 0.0005
    norm_and_bias 3 0.0
    """
    for value in (weight_decay, norm_weight_decay):
        if not 0 <= value < math.inf:
            raise ValueError(f"weight decay must be finite and ≥ 0, got {value}")
    in_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORMS)
        for parameter in module.parameters(recurse=False)
    }
    weights, norms_and_biases = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.rpartition(".")[2] == "bias"
        spared = is_bias or parameter.ndim <= 1 or id(parameter) in in_norms
        (norms_and_biases if spared else weights).append(parameter)
    if not weights and not norms_and_biases:
        raise ValueError("the model has no trainable parameter")
    groups = [
        {"name": "weight", "params": weights, "weight_decay": weight_decay},
        {
            "name": "norm_and_bias",
            "params": norms_and_biases,
            "weight_decay": norm_weight_decay,
        },
    ]
    return [group for group in groups if group["params"]]


def check_groups(model: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError, naming the strays, unless `groups` hold each trainable parameter once.

    Missing, repeated, frozen and foreign parameters are strays. `groups` are lists of parameters
    under "params", such as `optimizer.param_groups`.

    >>> model = nn.Linear(4, 2)
    >>> check_groups(model, [{"params": [model.weight, model.bias]}])
    >>> check_groups(model, [{"params": [model.weight, model.weight]}])
    Traceback (most recent call last):
    ValueError: parameter groups: missing: bias; repeated: weight
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    grouped = [parameter for group in groups for parameter in group["params"]]
    count = Counter(map(id, grouped))
    strays = {
        "missing": [n for key, n in names.items() if key in trainable and key not in count],
        "repeated": [n for key, n in names.items() if count[key] > 1],
        "frozen": [n for key, n in names.items() if key in count and key not in trainable],
        "not the model's": [str(tuple(p.shape)) for p in grouped if id(p) not in names],
    }
    if any(strays.values()):
        lines = [f"{fault}: {', '.join(found)}" for fault, found in strays.items() if found]
        raise ValueError(f"parameter groups: {'; '.join(lines)}")

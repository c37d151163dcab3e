"""Parameter groups for the optimizer: which weights decay, the rate of each part, and a check that
none is missing.

No decay for norms and biases: He et al., "Bag of Tricks for Image Classification with
Convolutional Neural Networks", CVPR 2019, section 3.1, https://arxiv.org/abs/1812.01187
A rate for each layer, smaller towards the input: Howard and Ruder, "Universal Language Model
Fine-tuning for Text Classification", ACL 2018, section 3.2, https://arxiv.org/abs/1801.06146; in
transformers: Clark et al., "ELECTRA", ICLR 2020, https://arxiv.org/abs/2003.10555
"""

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any

from torch import nn

__all__ = ["check_groups", "layer_decay_rates", "prefix_groups", "weight_decay_groups"]

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def weight_decay_groups(
    model: nn.Module, weight_decay: float, norm_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into those that decay and the norms and biases.

    Returns groups for any torch optimizer, each with "name", "params" and "weight_decay".
    "norm_and_bias" (`norm_weight_decay`) holds biases, parameters of normalisation layers,
    parameters of at most one dimension, tables of relative positions, and those that the model's
    own `no_weight_decay()` names, as timm's networks do (class token, position embeddings).
    "weight" (`weight_decay`) holds the rest: the kernels and matrices, and, as in torchvision's
    `set_weight_decay`, the tokens and positions of networks that name none. Each
    trainable parameter is in exactly one group, a tied one under its first name; frozen ones are
    left out, and so is a group that would be empty.

    Raises ValueError for a decay that is negative or not finite, and where nothing is trainable.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> for group in weight_decay_groups(model, 5e-4):
    ...     print(group["name"], len(group["params"]), group["weight_decay"])
    weight 1 0.0005
    norm_and_bias 3 0.0
    """
    _check_decays(weight_decay, norm_weight_decay)
    exempt_ids = _norms_and_biases(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    groups = [
        {
            "name": "weight",
            "params": [parameter for parameter in trainable if id(parameter) not in exempt_ids],
            "weight_decay": weight_decay,
        },
        {
            "name": "norm_and_bias",
            "params": [parameter for parameter in trainable if id(parameter) in exempt_ids],
            "weight_decay": norm_weight_decay,
        },
    ]
    return [group for group in groups if group["params"]]


def prefix_groups(
    model: nn.Module,
    rates: Mapping[str, float],
    weight_decay: float,
    norm_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters by the module they are in, each with its own rate.

    The keys of `rates` are names as in `named_modules` and `named_parameters`: "layer4" is
    everything in layer4, and not layer40; "class_token" is that parameter. In the order of
    `rates`, each gives up to two groups for any torch optimizer, the weights (`weight_decay`) and
    the norms and biases (`norm_weight_decay`) by the rule of `weight_decay_groups`. A group has
    "name" ("layer4" and "layer4 (norm, bias)"), "label" ("layer4" in both), "lr", "weight_decay"
    and "params". Each trainable parameter is in exactly one group, a tied one under the first of
    its names that has a rate; frozen ones are left out, and so is a group that would be empty.

    Raises ValueError, with the names, for a key that is not the model's or has nothing trainable,
    for a key under another one, for trainable parameters without a rate, for a rate that is not
    finite and > 0, and for a decay that is negative or not finite.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
    >>> for group in prefix_groups(model, {"0": 0.001, "1": 0.001, "2": 0.01}, 5e-4):
    ...     print(group["name"], group["lr"], group["weight_decay"], len(group["params"]))
    0 0.001 0.0005 1
    0 (norm, bias) 0.001 0.0 1
    1 (norm, bias) 0.001 0.0 2
    2 0.01 0.0005 1
    2 (norm, bias) 0.01 0.0 1
    """
    _check_decays(weight_decay, norm_weight_decay)
    for prefix, lr in rates.items():
        if not 0 < lr < math.inf:
            raise ValueError(f"the rate of {prefix!r} must be finite and > 0, got {lr}")
    for a, b in combinations(rates, 2):
        if _under(a, b) or _under(b, a):
            raise ValueError(f"{a!r} and {b!r} overlap: a parameter has one rate")
    _check_prefixes(model, rates)

    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for prefix in rates:
            if _under(name, prefix):
                owners.setdefault(id(parameter), prefix)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    strays = [name for name, parameter in trainable.items() if id(parameter) not in owners]
    if strays:
        raise ValueError(f"parameter groups: no rate for: {', '.join(strays)}")

    exempt_ids = _norms_and_biases(model)
    groups = []
    for prefix, lr in rates.items():
        parameters = [
            parameter for parameter in trainable.values() if owners[id(parameter)] == prefix
        ]
        groups += [
            {
                "name": prefix,
                "label": prefix,
                "lr": lr,
                "weight_decay": weight_decay,
                "params": [
                    parameter for parameter in parameters if id(parameter) not in exempt_ids
                ],
            },
            {
                "name": f"{prefix} (norm, bias)",
                "label": prefix,
                "lr": lr,
                "weight_decay": norm_weight_decay,
                "params": [parameter for parameter in parameters if id(parameter) in exempt_ids],
            },
        ]
    return [group for group in groups if group["params"]]


def layer_decay_rates(blocks: Sequence[str], lr: float, decay: float) -> dict[str, float]:
    """A learning rate for each block, smaller towards the input: `rates` of `prefix_groups`.

        rate of block i = lr · decay^(n - 1 - i)

    with the n names of `blocks` in order from the input to the head, which gets `lr`. ULMFiT uses
    a decay of 1 / 2.6 from layer to layer, ELECTRA 0.8; 1 is one rate for all.

    Raises ValueError unless `lr` is finite and > 0, 0 < `decay` ≤ 1, and there are blocks, each
    named once.

    >>> layer_decay_rates(["stem", "layer1", "layer2", "head"], lr=0.8, decay=0.5)
    {'stem': 0.1, 'layer1': 0.2, 'layer2': 0.4, 'head': 0.8}
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"the rate must be finite and > 0, got {lr}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    if not blocks or len(set(blocks)) < len(blocks):
        raise ValueError(f"blocks must be names, each once, got {blocks!r}")
    return {block: lr * decay ** (len(blocks) - 1 - i) for i, block in enumerate(blocks)}


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
    group_params = [parameter for group in groups for parameter in group["params"]]
    count = Counter(map(id, group_params))
    strays = {
        "missing": [n for key, n in names.items() if key in trainable and key not in count],
        "repeated": [n for key, n in names.items() if count[key] > 1],
        "frozen": [n for key, n in names.items() if key in count and key not in trainable],
        "not the model's": [str(tuple(p.shape)) for p in group_params if id(p) not in names],
    }
    if any(strays.values()):
        lines = [
            f"{fault}: {', '.join(stray_names)}"
            for fault, stray_names in strays.items()
            if stray_names
        ]
        raise ValueError(f"parameter groups: {'; '.join(lines)}")


def _check_decays(*decays: float) -> None:
    for value in decays:
        if not 0 <= value < math.inf:
            raise ValueError(f"weight decay must be finite and ≥ 0, got {value}")


def _norms_and_biases(model: nn.Module) -> set[int]:
    """The ids of the parameters of "norm_and_bias", see `weight_decay_groups`."""
    exempt_names = getattr(model, "no_weight_decay", set)()
    in_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORMS)
        for parameter in module.parameters(recurse=False)
    }
    return in_norms | {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1
        or name in exempt_names
        or name.rpartition(".")[2] in ("bias", "relative_position_bias_table")
    }


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _check_prefixes(model: nn.Module, prefixes: Iterable[str]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # the names of parameters, and of the modules that contain them
    names = [path for name in parameters for path in accumulate(name.split("."), "{}.{}".format)]
    for prefix in prefixes:
        if prefix not in names:
            matches = difflib.get_close_matches(prefix, names, n=1)
            children = ", ".join(dict.fromkeys(name for name in names if "." not in name))
            hint = f"did you mean {matches[0]!r}?" if matches else f"it has {children}"
            raise ValueError(f"no parameter of the model is in {prefix!r}; {hint}")
        if not any(p.requires_grad for name, p in parameters.items() if _under(name, prefix)):
            raise ValueError(f"{prefix!r} has a rate, and all of its parameters are frozen")

"""The head of a network: which layers give the logits, and how new ones start."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

HEADS = ("linear", "mlp")


class DropoutLinear(nn.Linear):
    """A linear layer with dropout on its input; its state has the keys of a plain nn.Linear."""

    p = 0.0

    def forward(self, features):
        return super().forward(nn.functional.dropout(features, self.p, self.training))

    def extra_repr(self):
        return f"{super().extra_repr()}, dropout={self.p}"


class MlpHead(nn.Sequential):
    """A head of two linear layers, with dropout before each and 256 features between them."""

    def __init__(self, in_features, num_classes):
        super().__init__(
            nn.Dropout(0.5),
            nn.Linear(in_features, 256),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            nn.Linear(256, num_classes),
        )


def heads(model) -> list[tuple[str, nn.Module]]:
    """(name, module) of each head: the Linear, squeezenet's Conv2d, or an MlpHead for the logits.

    There is one, except in networks that average the logits of several heads (a distilled DeiT).
    """
    modules = dict(model.named_modules())
    mlps = [(name, module) for name, module in modules.items() if isinstance(module, MlpHead)]
    if mlps:
        return mlps
    names = getattr(model, "head_names", None)  # of timm's networks, see _timm_heads
    names = names or getattr(model, "pretrained_cfg", {}).get("classifier")
    names = [names] if isinstance(names, str) else names or []
    if any(name in modules for name in names):
        return [(name, modules[name]) for name in names if name in modules]
    for kind in (nn.Linear, nn.Conv2d):
        layers = [(name, module) for name, module in modules.items() if isinstance(module, kind)]
        if layers:
            return layers[-1:]
    raise ValueError(f"{type(model).__name__} has neither a linear nor a convolutional layer")


def head(model) -> tuple[str, nn.Module]:
    """The first of `heads`."""
    return heads(model)[0]


def last_layers(model) -> list[nn.Module]:
    """The layer of each head that has one output a class."""
    return [
        [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        for _, module in heads(model)
    ]


def start_heads(model, size, rng=None) -> str:
    """Start new heads at zero, so that the first loss is ln(classes); returns the start in words.

    Constructors draw heads for training from scratch: EfficientNet's from ±1/√classes, ten times
    too large for 12 classes. A zero head lets no gradient through to the layers before it, but only
    in the first step. A head that would stay zero for ever, as squeezenet's, which ends in a ReLU,
    is drawn from N(0, 0.01).
    """
    layers = last_layers(model)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    with in_eval(model):
        logits = model(sample_image(model, size))
        loss = F.cross_entropy(logits, logits.new_zeros(1, dtype=torch.int64))
        weights = [layer.weight for layer in layers]
        learns = all(g.any() for g in torch.autograd.grad(loss, weights))
    if learns:
        return "zero"
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.01, generator=rng)
    return "N(0, 0.01)"


@contextmanager
def trial_heads(model):
    """Replace the weights of the last layers by fixed numbers while the block runs.

    For comparing two networks by their logits: with new heads, which are zero, all would be equal.
    """
    parameters = [p for layer in last_layers(model) for p in layer.parameters()]
    originals = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for n, parameter in enumerate(parameters):
            numbers = torch.arange(parameter.numel(), device=parameter.device)
            parameter.copy_(torch.cos(numbers + n).view_as(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)


@contextmanager
def in_eval(model):
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def sample_image(model, size):
    """An image without two equal values."""
    device = next(model.parameters()).device
    return torch.linspace(-1, 1, 3 * size * size, device=device).view(1, 3, size, size)


def run_with_input(model, module, images):
    """(logits, what `module` received), a copy: an activation may work in place."""
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    try:
        logits = model(images)
    finally:
        handle.remove()
    return logits, inputs[-1]

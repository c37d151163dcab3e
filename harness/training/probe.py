"""The linear probe of frozen features: what `--strategy auto` measures, and where a head starts.

A logistic regression on what the frozen network gives the head. Its accuracy says how far the
features tell the classes apart, and its weights are a better start for a linear head than any draw.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from harness.data.parts import stratified_order
from harness.models.heads import head, heads, in_eval, run_with_input, sample_image, trial_heads
from harness.processes import from_main
from harness.training.features import cut_at_head, extract

IMAGES = 5000  # that the probe is fitted to at most, and as many that it is scored on
HELD_OUT = 0.2  # of the train images it looks at, to score it where there is no validation split
HARDLY = 0.01  # of its mean, or of other features' spread: a feature that varies less says nothing


class Probe(NamedTuple):
    """A linear classifier of frozen features, and how well it does on images it has not seen."""

    layer: nn.Linear  # of features as the head receives them, float64
    accuracy: float
    images: int  # that it was scored on
    source: str  # which those are: "val" or "held-out train"

    @property
    def words(self) -> str:
        return f"{self.accuracy:.1%} of {self.images:,} {self.source} images"


def can_start_from_probe(model, size) -> bool:
    """Whether the probe can be put in the place of the head: one linear layer, the network's last.

    Not so for an mlp, for several heads, and where the network goes on after its head.
    """
    last = head(model)[1]
    if len(heads(model)) > 1 or not isinstance(last, nn.Linear) or last.bias is None:
        return False
    with trial_heads(model), in_eval(model), torch.no_grad():
        logits, received = run_with_input(model, last, sample_image(model, size))
        return received.ndim == 2 and torch.equal(
            logits, F.linear(received, last.weight, last.bias)
        )


def fit_probe(
    accelerator, model, splits, views, classes, seed, feature_cache, whole=False
) -> Probe:
    """The probe of a frozen network: fitted by one process, the same on all.

    It is scored on val, or on a part of train that is held out; test is not looked at. The features
    of no more images are computed than that takes, unless the `whole` splits will be wanted.
    feature_cache: as for harness.training.features.extract.
    """
    model.eval()
    train, val = splits["train"], splits.get("val")
    order = torch.from_numpy(stratified_order(train.labels.numpy(), seed))

    def features(role, index):
        if whole or len(index) == len(splits[role].labels):
            every = extract(accelerator, model, splits[role], views, 1, seed, feature_cache, role)
            return _subset(every, index)
        some = _subset(splits[role], index)
        return extract(accelerator, model, some, views, 1, seed, {}, f"some of {role}")

    if val is None:
        order = order[: round(IMAGES / (1 - HELD_OUT))]
        held_out = max(1, round(HELD_OUT * len(order)))
        every = features("train", order)
        parts = torch.arange(held_out, len(order)), torch.arange(held_out)
        fitted, scored = (_subset(every, part) for part in parts)
    else:
        fitted = every = features("train", order[:IMAGES])
        of_val = torch.from_numpy(stratified_order(val.labels.numpy(), seed))
        scored = features("val", of_val[:IMAGES])

    def fit():  # one opinion for all, whatever the last digits of the others are
        inputs = _inputs_of_head(model)
        layer = linear_probe(inputs(fitted), fitted.labels, classes)
        hits = layer(inputs(scored)).argmax(1) == scored.labels
        if every is not fitted:  # what was held out may help the head
            layer = linear_probe(inputs(every), every.labels, classes, layer)
        return layer.requires_grad_(False), hits.double().mean().item()

    layer, accuracy = from_main(accelerator, fit, patient=True)
    source = "val" if val is not None else "held-out train"
    return Probe(layer, accuracy, len(scored.labels), source)


@torch.no_grad()
def start_from_probe(model, probe):
    """Put the probe in the place of the head."""
    last = head(model)[1]
    last.weight.copy_(probe.layer.weight)
    last.bias.copy_(probe.layer.bias)


def linear_probe(features, labels, classes, start=None) -> nn.Linear:
    """Multinomial logistic regression with an L2 penalty of ½‖W‖² (C = 1), by L-BFGS.

    features: (n, d), standardised here; features that hardly vary have no say. labels: int64 (n,).
    start: a probe of much the same features, to begin at. Returns a layer (m, d) -> scores
    (m, classes), float64 on the CPU, that standardises by its weights and bias: equal to
    scikit-learn's LogisticRegression on standardised features.
    """
    features = features.double()
    std, mean = torch.std_mean(features, dim=0, correction=0)
    # A feature that is nearly constant would be enlarged until its rounding spoke
    varies = std > HARDLY * torch.maximum(mean.abs(), std.median())
    std = torch.where(varies, std, 1.0)
    x = torch.where(varies, (features - mean) / std, 0.0)
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype)
    bias = torch.zeros(classes, dtype=x.dtype)
    if start is not None:
        weight = (start.weight.detach() * std).T * varies.unsqueeze(1)
        bias = start.bias.detach() + start.weight.detach() @ mean
    weight, bias = (t.clone().contiguous().requires_grad_() for t in (weight, bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    layer = nn.Linear(x.shape[1], classes, dtype=x.dtype, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_((weight / std.unsqueeze(1)).T)
        layer.bias.copy_(bias - layer.weight @ mean)
    return layer


def _inputs_of_head(model):
    """A function: Samples of features -> what the head receives of view 0 (n, d), float64."""
    tail, last = cut_at_head(model).tail, head(model)[1]
    before = []
    if tail is not last:
        layers = list(tail)
        before = layers[: next(n for n, layer in enumerate(layers) if layer is last)]

    @torch.no_grad()
    def inputs(samples):
        features = samples.stored[samples.rows, 0].float()
        for layer in before:  # without parameters, on a CPU as good as on the device
            features = layer(features.clone())
        return (features.flatten(2).mean(2) if features.ndim > 2 else features).double()

    return inputs


def _subset(samples, index):
    return samples._replace(rows=samples.rows[index], labels=samples.labels[index])

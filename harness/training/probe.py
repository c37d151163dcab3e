"""The linear probe of frozen features: what `--strategy auto` measures, and where a head starts.

It is a logistic regression on what the head of the frozen network receives. Its accuracy says how
well the features tell the classes apart, and its weights are a better start for a linear head than
random ones.
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

IMAGES = 5000  # the most that the probe is fitted to, and the most that it is scored on
HELD_OUT = 0.2  # share of the train images read that score it, where there is no validation split
LEAST_SPREAD = 0.01  # of its mean, or of the median spread: a feature that varies less is not used


class Probe(NamedTuple):
    """A linear classifier of frozen features, and how well it does on images it has not seen."""

    layer: nn.Linear  # of features as the head receives them, float64
    accuracy: float
    images: int  # that it was scored on
    source: str  # of these images: "val" or "held-out train"

    @property
    def text(self) -> str:
        return f"{self.accuracy:.1%} of {self.images:,} {self.source} images"


def can_start_from_probe(model, size) -> bool:
    """Whether the probe can replace the head: one linear layer, the last of the network.

    It can't replace an mlp, several heads, or a head after which the network goes on.
    """
    layer = head(model)[1]
    if len(heads(model)) > 1 or not isinstance(layer, nn.Linear) or layer.bias is None:
        return False
    with trial_heads(model), in_eval(model), torch.no_grad():
        logits, received = run_with_input(model, layer, sample_image(model, size))
        return received.ndim == 2 and torch.equal(
            logits, F.linear(received, layer.weight, layer.bias)
        )


def fit_probe(
    accelerator, model, splits, views, classes, seed, feature_cache, all_images=False
) -> Probe:
    """The probe of a frozen network: fitted by one process, the same on all.

    It is scored on val, or on a part of train that is held out; test is not looked at.
    all_images: compute the features of whole splits, because later stages need them; else only
    those that the probe reads. feature_cache: as for harness.training.features.extract.
    """
    model.eval()
    train, val = splits["train"], splits.get("val")
    order = torch.from_numpy(stratified_order(train.labels.numpy(), seed))

    def features(role, index):
        if all_images or len(index) == len(splits[role].labels):
            samples = extract(accelerator, model, splits[role], views, 1, seed, feature_cache, role)
            return _subset(samples, index)
        subset = _subset(splits[role], index)
        return extract(accelerator, model, subset, views, 1, seed, {}, f"a sample of {role}")

    if val is None:
        order = order[: round(IMAGES / (1 - HELD_OUT))]
        count = max(1, round(HELD_OUT * len(order)))
        train_samples = features("train", order)
        fit_samples = _subset(train_samples, torch.arange(count, len(order)))
        score_samples = _subset(train_samples, torch.arange(count))
    else:
        fit_samples = train_samples = features("train", order[:IMAGES])
        val_order = torch.from_numpy(stratified_order(val.labels.numpy(), seed))
        score_samples = features("val", val_order[:IMAGES])

    def fit():  # by one process, for the last digits may differ between processes
        inputs = _inputs_of_head(model)
        layer = linear_probe(inputs(fit_samples), fit_samples.labels, classes)
        hits = layer(inputs(score_samples)).argmax(1) == score_samples.labels
        if train_samples is not fit_samples:  # the head may learn from the held-out images, too
            layer = linear_probe(inputs(train_samples), train_samples.labels, classes, layer)
        return layer.requires_grad_(False), hits.double().mean().item()

    layer, accuracy = from_main(accelerator, fit, patient=True)
    source = "val" if val is not None else "held-out train"
    return Probe(layer, accuracy, len(score_samples.labels), source)


@torch.no_grad()
def start_from_probe(model, probe):
    """Copy the probe's weights and bias into the head."""
    layer = head(model)[1]
    layer.weight.copy_(probe.layer.weight)
    layer.bias.copy_(probe.layer.bias)


def linear_probe(features, labels, classes, start=None) -> nn.Linear:
    """Multinomial logistic regression with an L2 penalty of ½‖W‖² (C = 1), by L-BFGS.

    features: (n, d), standardised here; those that hardly vary are not used. labels: int64 (n,).
    start: a probe of similar features, at which the search begins. Returns a layer (m, d) -> scores
    (m, classes), float64 on the CPU, whose weights and bias include the standardisation: equal to
    scikit-learn's LogisticRegression on standardised features.
    """
    features = features.double()
    std, mean = torch.std_mean(features, dim=0, correction=0)
    # Standardising a feature that is nearly constant would enlarge its rounding errors
    mask = std > LEAST_SPREAD * torch.maximum(mean.abs(), std.median())
    std = torch.where(mask, std, 1.0)
    x = torch.where(mask, (features - mean) / std, 0.0)
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype)
    bias = torch.zeros(classes, dtype=x.dtype)
    if start is not None:
        weight = (start.weight.detach() * std).T * mask.unsqueeze(1)
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
    tail, head_layer = cut_at_head(model).tail, head(model)[1]
    layers = []  # before the head
    if tail is not head_layer:
        children = list(tail)
        layers = children[: next(n for n, child in enumerate(children) if child is head_layer)]

    @torch.no_grad()
    def inputs(samples):
        features = samples.stored[samples.rows, 0].float()
        for layer in layers:  # they have no parameters: the CPU will do
            features = layer(features.clone())
        return (features.flatten(2).mean(2) if features.ndim > 2 else features).double()

    return inputs


def _subset(samples, index):
    return samples._replace(rows=samples.rows[index], labels=samples.labels[index])

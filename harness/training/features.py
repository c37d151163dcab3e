"""Features of the frozen part, computed once: what a head that trains alone learns from.

Where only the head trains, the rest of the network gives the same output for the same pixels every
time. So each image's features are computed for a few augmented views, and every epoch draws one of
them for every image.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import psutil
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth
from tqdm.auto import tqdm

from harness.counters import SampleStreams
from harness.data.stores import Samples
from harness.errors import StopAsked, UserError
from harness.models.heads import (
    DropoutLinear,
    head,
    in_eval,
    run_with_input,
    sample_image,
    trial_heads,
)
from harness.processes import from_each
from harness.training.scoring import batch_starts
from harness.training.stages import apply_stage


class Cut(NamedTuple):
    """Where a network is cut: `tail` maps to logits what `entry`, its first module, receives."""

    entry: nn.Module
    tail: nn.Module


class CachedViews:
    """In the place of harness.data.batches.Views for samples that are features (n, views, ...)."""

    alternating = False  # images were mirrored, or not, when their features were computed

    def __init__(self, views):
        self.views = views

    def draw(self, n, rng, flips=None, sizes=None):
        """Draw which view each of n samples shows, from SampleStreams; the rest is for images."""
        return {"view": (rng(n, 1).squeeze(1) * self.views).long()}

    def train(self, features, draw):
        """The drawn view of each sample (n, ...)."""
        view = draw["view"].to(features.device, non_blocking=features.is_cuda)
        return features[torch.arange(len(features), device=features.device), view]

    def evaluation(self, features):
        """The first view, which is not augmented."""
        return features[:, 0]


def cut_at_head(model) -> Cut:
    """Cut before the head and the parameter-free layers that lead to it (dropout, flatten)."""
    name, last = head(model)
    parent = model.get_submodule(name.rpartition(".")[0])
    if type(parent) is not nn.Sequential:
        return Cut(last, last)
    children = list(parent)
    first = children.index(last)
    while first and not any(True for _ in children[first - 1].parameters()):
        first -= 1
    return Cut(children[first], nn.Sequential(*children[first:]))


@torch.no_grad()
def can_cache(model, size, cut) -> bool:
    """Whether, with the model's present modes, its logits are `cut.tail` of constant features.

    Not so where something outside the tail trains, draws at random or adapts, or where the
    network goes on after its head (squeezenet).
    """
    if getattr(model, "drop_rate", 0) and not any(
        isinstance(m, _DropoutNd) for m in cut.tail.modules()
    ):
        return False  # timm's networks may call dropout as a function
    inside = {id(module) for module in cut.tail.modules()}
    for module in model.modules():
        random = isinstance(module, _DropoutNd | StochasticDepth | DropoutLinear) and module.p
        if (
            id(module) not in inside
            and module.training
            and (random or isinstance(module, _BatchNorm))
        ):
            return False
    trained = {id(p) for p in cut.tail.parameters()}
    if any(p.requires_grad and id(p) not in trained for p in model.parameters()):
        return False
    with trial_heads(model), in_eval(model):
        logits, features = run_with_input(model, cut.entry, sample_image(model, size))
        again = cut.tail(features.clone())
    return again.shape == logits.shape and torch.equal(again, logits)


def cacheable_stages(stages, model, size) -> list[str]:
    """The names of the stages that train on kept features: the first ones, if only a head trains.

    Not a later one, whose frozen part has been trained: the averaged weights would want features
    of their own. Nor one that mixes images. Leaves the model in one of the stages.
    """
    names = []
    for stage in stages:
        apply_stage(model, stage)
        wanted = stage.options.views and not stage.options.mixes()
        if not wanted or not can_cache(model, size, cut_at_head(model)):
            break
        names.append(stage.name)
    return names


def extract_splits(accelerator, model, splits, views, number, seed, feature_cache, stop=None):
    """{role: Samples of features} of train (`number` views) and what the epochs evaluate."""
    evaluated = "val" if "val" in splits else "test"
    wanted = {"train": number, evaluated: 1}
    return {
        role: extract(
            accelerator, model, splits[role], views, count, seed, feature_cache, role, stop
        )
        for role, count in wanted.items()
        if role in splits
    }


def view_batch(samples, views, rows, view, seed, device="cpu"):
    """Images (float32, normalised) of these rows as view `view` shows them, and their labels.

    rows: int64 (n,). View 0 is that of evaluation; what another draws depends on seed, view and
    row alone.
    """
    device = torch.device(device)
    if view == 0:
        images, labels = samples.take(rows, device)
        return views.evaluation(images), labels
    streams = SampleStreams(seed, "features", view, places=rows)
    draw = views.draw(len(rows), streams, sizes=samples.sizes(rows))
    images, labels = samples.take(rows, device, draw.get("boxes"))
    return views.train(images, draw), labels


@torch.no_grad()
def extract(accelerator, model, samples, views, number, seed, feature_cache, name, stop=None):
    """Samples whose "pixels" are features (n, number, ...): view 0 as in evaluation, others drawn.

    model: the unwrapped module, its frozen part in eval mode. samples, views: harness.data.batches.
    feature_cache: a dict of features that is read and added to, so that nothing is computed twice.
    The batches are dealt to the processes, and all get all of them.

    Raises UserError where the features would take more than the memory left; after a signal
    StopAsked, on all processes. stop: as for harness.training.scoring.evaluate.
    """
    starts, total = batch_starts(samples), len(samples.labels)
    drawn = repr(sorted(vars(views).items()))
    keys = [(name, view, drawn if view else None) for view in range(number)]
    cut, progress = cut_at_head(model), accelerator.is_local_main_process
    todo = [key for key in keys if key not in feature_cache]
    bar = tqdm(
        total=total * len(todo), desc=f"features of {name}", unit=" images", delay=1, leave=False,
        disable=not progress,
    )  # fmt: skip
    for key in todo:
        features, view = None, key[1]
        for k in range(accelerator.process_index, len(starts), accelerator.num_processes):
            if stop and stop():
                break
            rows = torch.arange(starts[k], min(starts[k] + starts.step, total))
            images, _ = view_batch(samples, views, rows, view, seed, accelerator.device)
            with accelerator.autocast():
                _, found = run_with_input(model, cut.entry, images)
            if features is None:
                _check_memory(total * number, found[0])
                features = found.new_zeros(total, *found.shape[1:], device="cpu")
            features[starts[k] : starts[k] + len(found)] = found.cpu()
            bar.update(min(len(found) * accelerator.num_processes, bar.total - bar.n))
        stopped = sum(from_each(accelerator, stop)) if stop else 0
        if stopped:
            raise StopAsked(stopped)
        feature_cache[key] = _from_all(accelerator, features)
    bar.close()
    stacked = torch.stack([feature_cache[key] for key in keys], dim=1)
    return Samples(stacked, torch.arange(total), samples.labels)


def _check_memory(number, one):
    # Every process of this machine holds all views, and once more while they are put together
    copies = 2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    wanted = copies * number * one.numel() * one.element_size()
    free = psutil.virtual_memory().available
    if wanted > free:
        raise UserError(
            f"the features of {number:,} views would take {wanted / 2**30:.1f} GiB of "
            f"{free / 2**30:.1f} GiB of free memory: fewer --views, or 0 for none kept"
        )


def _from_all(accelerator, features):
    """Each sample was computed by one process and is zero on the others: their sum is exact."""
    if accelerator.num_processes == 1:
        return features
    # A process that had no batch does not know the shape
    shapes = [None] * accelerator.num_processes
    mine = None if features is None else (features.shape, features.dtype)
    torch.distributed.all_gather_object(shapes, mine)
    shape, dtype = next(shape for shape in shapes if shape)
    features = torch.zeros(shape, dtype=dtype) if features is None else features
    return accelerator.reduce(features.to(accelerator.device), "sum").cpu()

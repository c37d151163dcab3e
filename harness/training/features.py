"""Features of the frozen part of a network, computed once: a head that trains alone takes them.

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
    """Where a network is cut: `tail` maps the input of its first module, `entry`, to logits."""

    entry: nn.Module
    tail: nn.Module


class CachedViews:
    """Replaces harness.data.batches.Views where samples are features (n, views, ...)."""

    alternating = False  # images were mirrored, or not, when their features were computed

    def __init__(self, views):
        self.views = views

    def draw(self, n, rng, flips=None, sizes=None):
        """Draw the view of each of n samples. rng: SampleStreams. flips, sizes: not used."""
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
    name, layer = head(model)
    parent = model.get_submodule(name.rpartition(".")[0])
    if type(parent) is not nn.Sequential:
        return Cut(layer, layer)
    children = list(parent)
    start = children.index(layer)
    while start and not any(True for _ in children[start - 1].parameters()):
        start -= 1
    return Cut(children[start], nn.Sequential(*children[start:]))


@torch.no_grad()
def can_cache(model, size, cut) -> bool:
    """Whether, in the model's present modes, its logits are `cut.tail` of constant features.

    The features change where something outside the tail trains, draws at random or adapts. And the
    logits are not those of the tail where the network goes on after its head (squeezenet).
    """
    if getattr(model, "drop_rate", 0) and not any(
        isinstance(m, _DropoutNd) for m in cut.tail.modules()
    ):
        return False  # timm's networks may call dropout as a function
    tail_modules = {id(module) for module in cut.tail.modules()}
    for module in model.modules():
        random = isinstance(module, _DropoutNd | StochasticDepth | DropoutLinear) and module.p
        if (
            id(module) not in tail_modules
            and module.training
            and (random or isinstance(module, _BatchNorm))
        ):
            return False
    tail_parameters = {id(p) for p in cut.tail.parameters()}
    if any(p.requires_grad and id(p) not in tail_parameters for p in model.parameters()):
        return False
    with trial_heads(model), in_eval(model):
        logits, features = run_with_input(model, cut.entry, sample_image(model, size))
        tail_logits = cut.tail(features.clone())
    return tail_logits.shape == logits.shape and torch.equal(tail_logits, logits)


def cacheable_stages(stages, model, size) -> list[str]:
    """The names of the stages that train on kept features: the first ones, if only a head trains.

    No stage counts after one that trained the frozen part, because the averaged weights would need
    features of their own; and none that mixes images. The model is left in one of the stages.
    """
    names = []
    for stage in stages:
        apply_stage(model, stage)
        may_cache = stage.options.views and not stage.options.mixes()
        if not may_cache or not can_cache(model, size, cut_at_head(model)):
            break
        names.append(stage.name)
    return names


def extract_splits(accelerator, model, splits, views, number, seed, feature_cache, stop=None):
    """{role: Samples of features}: `number` views of train, one of the split that epochs score."""
    eval_role = "val" if "val" in splits else "test"
    view_counts = {"train": number, eval_role: 1}
    return {
        role: extract(
            accelerator, model, splits[role], views, count, seed, feature_cache, role, stop
        )
        for role, count in view_counts.items()
        if role in splits
    }


def view_batch(samples, views, rows, view, seed, device="cpu"):
    """(images of some rows in view number `view`, normalised float32; their labels).

    rows: int64 (n,). View 0 is the one of evaluation; the draws of any other depend only on the
    seed, the view and the row.
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
    """Samples of features (n, number, ...) instead of images; view 0 is not augmented.

    model: the unwrapped module, its frozen part in eval mode. samples, views: harness.data.batches.
    feature_cache: a dict of features that is read and added to, so that nothing is computed twice.
    The batches are shared out to the processes, and every process gets the features of all.

    Raises UserError where the features would take more than the free memory; and StopAsked, on all
    processes, after a signal to one. stop: as for harness.training.scoring.evaluate.
    """
    starts, total = batch_starts(samples), len(samples.labels)
    augmentation = repr(sorted(vars(views).items()))
    keys = [(name, view, augmentation if view else None) for view in range(number)]
    cut, progress = cut_at_head(model), accelerator.is_local_main_process
    missing_keys = [key for key in keys if key not in feature_cache]
    bar = tqdm(
        total=total * len(missing_keys), desc=f"features of {name}", unit=" images", delay=1,
        leave=False, disable=not progress,
    )  # fmt: skip
    for key in missing_keys:
        features, view = None, key[1]
        for k in range(accelerator.process_index, len(starts), accelerator.num_processes):
            if stop and stop():
                break
            rows = torch.arange(starts[k], min(starts[k] + starts.step, total))
            images, _ = view_batch(samples, views, rows, view, seed, accelerator.device)
            with accelerator.autocast():
                _, batch = run_with_input(model, cut.entry, images)
            if features is None:
                _check_memory(total * number, batch[0])
                features = batch.new_zeros(total, *batch.shape[1:], device="cpu")
            features[starts[k] : starts[k] + len(batch)] = batch.cpu()
            bar.update(min(len(batch) * accelerator.num_processes, bar.total - bar.n))
        stopped = sum(from_each(accelerator, stop)) if stop else 0
        if stopped:
            raise StopAsked(stopped)
        feature_cache[key] = _from_all(accelerator, features)
    bar.close()
    stacked = torch.stack([feature_cache[key] for key in keys], dim=1)
    return Samples(stacked, torch.arange(total), samples.labels)


def _check_memory(number, view):
    # Every process of this machine holds all views, and a second copy while they are stacked
    copies = 2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size = copies * number * view.numel() * view.element_size()
    free = psutil.virtual_memory().available
    if size > free:
        raise UserError(
            f"the features of {number:,} views would take {size / 2**30:.1f} GiB of "
            f"{free / 2**30:.1f} GiB of free memory: give fewer --views, or 0 to keep none"
        )


def _from_all(accelerator, features):
    """Each sample was computed by one process and is zero on the others: their sum is exact."""
    if accelerator.num_processes == 1:
        return features
    # A process that had no batch does not know the shape
    shapes = [None] * accelerator.num_processes
    signature = None if features is None else (features.shape, features.dtype)
    torch.distributed.all_gather_object(shapes, signature)
    shape, dtype = next(shape for shape in shapes if shape)
    features = torch.zeros(shape, dtype=dtype) if features is None else features
    return accelerator.reduce(features.to(accelerator.device), "sum").cpu()

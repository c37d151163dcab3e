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

from harness.counters import generator
from harness.data.batches import Samples, cut_draw, mixes
from harness.data.pixels import epoch_order
from harness.errors import UserError
from harness.models.heads import (
    DropoutLinear,
    head,
    in_eval,
    run_with_input,
    sample_image,
    trial_heads,
)
from harness.training.scoring import batch_starts
from harness.training.stages import enter


class Cut(NamedTuple):
    """Where a network is cut: `tail` maps to logits what `entry`, its first module, receives."""

    entry: nn.Module
    tail: nn.Module


class CachedViews:
    """In the place of harness.data.batches.Views for samples that are features (n, views, ...)."""

    alternating = False  # images were mirrored, or not, when their features were computed

    def __init__(self, views):
        self.views = views

    def draw(self, n, rng, flips=None):
        """Draw which view each of n samples shows; flips are for images."""
        return {"view": torch.randint(self.views, (n,), generator=rng)}

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


def kept_in(stages, model, size) -> list[str]:
    """The names of the stages that train on kept features: the first ones, if only a head trains.

    Not a later one, whose frozen part has been trained: the averaged weights would want features
    of their own. Nor one that mixes images. Leaves the model in one of the stages.
    """
    names = []
    for stage in stages:
        enter(model, stage)
        wanted = stage.args.views and not mixes(stage.args)
        if not wanted or not can_cache(model, size, cut_at_head(model)):
            break
        names.append(stage.name)
    return names


def extract_splits(accelerator, model, splits, views, args, known):
    """{role: Samples of features} of train (args.views views) and what the epochs evaluate."""
    evaluated = "val" if "val" in splits else "test"
    wanted = {"train": args.views, evaluated: 1}
    return {
        role: extract(accelerator, model, splits[role], views, number, args.seed, known, role)
        for role, number in wanted.items()
        if role in splits
    }


def view_batch(samples, views, start, view, seed, device="cpu"):
    """The evaluation batch that starts at `start` as view `view` shows it, and its labels."""
    step, total = batch_starts(samples).step, len(samples.labels)
    index = torch.arange(start, min(start + step, total))
    images, labels = samples.take(index, torch.device(device))
    if view == 0:
        return views.evaluation(images), labels
    draw = views.draw(len(index), generator(seed, "features", view, start))
    return views.train(images, draw), labels


def shown_batch(samples, views, number, view, seed):
    """Up to `number` images as view `view` shows them, and their labels: those that come first.

    Of the first epoch's order; what is drawn is what was drawn when their features were computed.
    """
    step, total = batch_starts(samples).step, len(samples.labels)
    rows = epoch_order(total, seed, 0)[:number]
    images, labels = samples.take(rows, torch.device("cpu"))
    if view == 0:
        return views.evaluation(images), labels
    shown = []
    for row, image in zip(rows.tolist(), images, strict=True):
        start = row // step * step
        size = min(step, total - start)
        draw = views.draw(size, generator(seed, "features", view, start))
        own = slice(row - start, row - start + 1)
        shown.append(
            views.train(image.unsqueeze(0), {k: cut_draw(v, own) for k, v in draw.items()})
        )
    return torch.cat(shown), labels


@torch.no_grad()
def extract(accelerator, model, samples, views, number, seed, known, name):
    """Samples whose "pixels" are features (n, number, ...): view 0 as in evaluation, others drawn.

    model: the unwrapped module, its frozen part in eval mode. samples, views: harness.data.batches.
    known: a dict of features that is read and added to, so that nothing is computed twice. The
    batches are dealt to the processes, and all get all of them.

    Raises UserError where the features would take more than the memory left.
    """
    starts, total = batch_starts(samples), len(samples.labels)
    drawn = repr(sorted(vars(views).items()))
    keys = [(name, view, drawn if view else None) for view in range(number)]
    cut, progress = cut_at_head(model), accelerator.is_local_main_process
    todo = [key for key in keys if key not in known]
    bar = tqdm(
        total=total * len(todo), desc=f"features of {name}", unit=" images", delay=1, leave=False,
        disable=not progress,
    )  # fmt: skip
    for key in todo:
        features, view = None, key[1]
        for k in range(accelerator.process_index, len(starts), accelerator.num_processes):
            images, _ = view_batch(samples, views, starts[k], view, seed, accelerator.device)
            with accelerator.autocast():
                _, found = run_with_input(model, cut.entry, images)
            if features is None:
                _check_memory(total * number, found[0])
                features = found.new_zeros(total, *found.shape[1:], device="cpu")
            features[starts[k] : starts[k] + len(found)] = found.cpu()
            bar.update(min(len(found) * accelerator.num_processes, bar.total - bar.n))
        known[key] = _from_all(accelerator, features)
    bar.close()
    stacked = torch.stack([known[key] for key in keys], dim=1)
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

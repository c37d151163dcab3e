"""Evaluation that counts every sample exactly once, the same at any number of processes."""

from __future__ import annotations

import torch

from harness.errors import StopAsked
from harness.metrics import METRICS, batch_sums
from tricks.tta import average_views

BATCH = (64, 256)  # fewest and most samples of an evaluation batch
BATCH_PIXELS = 2**21  # and between them as many as have so many pixels


def batch_starts(split) -> range:
    """Where the evaluation batches of Samples start; the same however many processes share them."""
    pixels = split.pixels.shape[1:].numel() // 3
    step = min(max(BATCH_PIXELS // max(pixels, 1), BATCH[0]), BATCH[1])
    return range(0, len(split.labels), step)


@torch.inference_mode()
def evaluate(accelerator, model, split, prepare, tta_views=None, stop=None):
    """The metrics of `model` on one split, by their names in harness.metrics.METRICS.

    model: the unwrapped module. split: harness.data.stores.Samples. prepare: uint8 batch on the
    device -> what the network takes. tta_views: of tricks.tta, whose probabilities are averaged;
    None for the image as it is. stop: a function without arguments -> a number over 0 where this
    process was asked to leave off (`Run.asked_to_stop`).

    The samples are cut into fixed batches by index and dealt to the processes in turn; sums are
    kept per batch and added in the order of the batches. So neither padding nor duplicates exist,
    and the result does not depend on how many processes shared the work. Raises StopAsked on all
    processes where one was asked to.
    """
    total = len(split.labels)
    starts = batch_starts(split)
    columns = len(METRICS) + 2  # and samples, stop
    sums = torch.zeros(len(starts), columns, device=accelerator.device)
    modes = [(module, module.training) for module in model.modules()]  # frozen parts stay in eval
    model.eval()
    for k in range(accelerator.process_index, len(starts), accelerator.num_processes):
        if stop and stop():
            break
        index = torch.arange(starts[k], min(starts[k] + starts.step, total))
        images, labels = split.take(index, accelerator.device)
        with accelerator.autocast():
            if tta_views is None:
                logits = model(prepare(images)).float()
            else:
                views = [model(prepare(view.apply(images, index))).float() for view in tta_views]
                weights = [view.weight for view in tta_views]
                logits = average_views(torch.stack(views), weights, check=False)
        # Filled there: new_tensor would copy from the host's memory, and wait for the device
        values = batch_sums(logits, labels)
        sums[k, :-1] = torch.cat([values, values.new_full((1,), len(labels))])
    for module, training in modes:
        module.training = training
    if stop:
        sums[0, -1].fill_(stop())
    *values, count, stopped = _read_sums(accelerator, sums)
    if stopped:
        raise StopAsked(stopped)
    assert count == total, f"{count} samples were scored instead of {total}"
    return {name: value / total for name, value in zip(METRICS, values, strict=True)}


def _read_sums(accelerator, sums):
    """The sums over all batches and processes as numbers: where an evaluation waits, once."""
    return accelerator.reduce(sums, "sum").cpu().double().sum(0).tolist()


def evaluate_epoch(run, network, splits, prepare):
    """{"val/acc": …, "val/acc_ema": …} at the end of an epoch: of test without val, else nothing.

    run: a Run. network: what sees the samples of `splits`: the run's module, or a part of it.
    prepare: as for `evaluate`.
    """
    split = "val" if "val" in splits else "test"
    if split not in splits:
        return {}

    def once():
        return evaluate(run.accelerator, network, splits[split], prepare, stop=run.asked_to_stop)

    return {f"{split}/{name}": value for name, value in score(run.module, run.ema, once).items()}


def score(model, ema, evaluate):
    """The metrics of the raw weights, and of the averaged ones with names that end in `_ema`.

    evaluate: a function without arguments -> {metric: value} of the weights in `model`.
    """
    scores = evaluate()
    if not ema:
        return scores
    with ema.applied_to(model):
        averaged = evaluate()
    return scores | {f"{name}_ema": value for name, value in averaged.items()}

"""Evaluation that counts every sample exactly once, the same at any number of processes."""

from __future__ import annotations

import torch

from harness.errors import StopAsked
from harness.metrics import ALWAYS, METRICS, computed
from harness.processes import from_main
from tricks.tta import average_views

BATCH = (64, 256)  # fewest and most samples of an evaluation batch
BATCH_PIXELS = 2**21  # and between them as many as have so many pixels


def batch_starts(split) -> range:
    """Where the evaluation batches of Samples start; the same however many processes share them."""
    pixels = split.stored.shape[1:].numel() // 3
    step = min(max(BATCH_PIXELS // max(pixels, 1), BATCH[0]), BATCH[1])
    return range(0, len(split.labels), step)


def evaluate(
    accelerator, model, split, prepare, tta_views=None, stop=None, metrics=ALWAYS, whole=False
):
    """{name: value} of the metrics of `model` on one split.

    model: the unwrapped module. split: harness.data.stores.Samples. prepare: uint8 batch on the
    device -> what the network takes. tta_views: of tricks.tta, whose probabilities are averaged;
    None for the image as it is. stop: a function without arguments -> a number over 0 where this
    process was asked to leave off (`Run.asked_to_stop`). metrics: names in
    harness.metrics.METRICS. whole: return ({name: value}, logits), all logits in the order of the
    samples, float32 (n, classes) on the CPU.

    The samples are cut into fixed batches by index and dealt to the processes in turn; sums are
    kept per batch and added in the order of the batches. So neither padding nor duplicates exist,
    and the result does not depend on how many processes shared the work. Raises StopAsked on all
    processes where one was asked to.
    """
    total = len(split.labels)
    summed = [name for name in metrics if METRICS[name].batch_sum]
    of_all = [name for name in metrics if METRICS[name].of_all]
    keeps_logits = whole or bool(of_all)
    sums, logits = _forward(
        accelerator, model, split, prepare, tta_views, stop, summed, keeps_logits
    )
    *values, count, stopped = _read_sums(accelerator, sums)
    if stopped:
        raise StopAsked(stopped)
    assert count == total, f"{count} samples were scored instead of {total}"
    scores = {name: value / total for name, value in zip(summed, values, strict=True)}
    if keeps_logits:
        logits = _read_logits(accelerator, logits, total)
    if of_all:
        scores |= from_main(
            accelerator,
            lambda: {n: METRICS[n].of_all(logits.double(), split.labels) for n in of_all},
        )
    scores = {name: scores[name] for name in metrics}
    return (scores, logits) if whole else scores


@torch.inference_mode()
def _forward(accelerator, model, split, prepare, tta_views, stop, summed, keeps_logits):
    """(sums of each batch (batches, summed + samples + stop), logits (n, classes) or None).

    Both on the device, zero where the work was another process's.
    """
    total, starts, logits = len(split.labels), batch_starts(split), None
    sums = torch.zeros(len(starts), len(summed) + 2, device=accelerator.device)
    modes = [(module, module.training) for module in model.modules()]  # frozen parts stay in eval
    model.eval()
    for k in range(accelerator.process_index, len(starts), accelerator.num_processes):
        if stop and stop():
            break
        index = torch.arange(starts[k], min(starts[k] + starts.step, total))
        images, labels = split.take(index, accelerator.device)
        with accelerator.autocast():
            if tta_views is None:
                found = model(prepare(images)).float()
            else:
                views = [model(prepare(view.apply(images, index))).float() for view in tta_views]
                weights = [view.weight for view in tta_views]
                found = average_views(torch.stack(views), weights, check=False)
        # Filled there: new_tensor would copy from the host's memory, and wait for the device
        values = torch.stack([METRICS[n].batch_sum(found, labels).float() for n in summed])
        sums[k, :-1] = torch.cat([values, values.new_full((1,), len(labels))])
        if keeps_logits:
            logits = found.new_zeros(total, found.shape[1]) if logits is None else logits
            logits[starts[k] : starts[k] + len(index)] = found
    for module, training in modes:
        module.training = training
    if stop:
        sums[0, -1].fill_(stop())
    return sums, logits


def _read_sums(accelerator, sums):
    """The sums over all batches and processes as numbers: where an evaluation waits, once."""
    return accelerator.reduce(sums, "sum").cpu().double().sum(0).tolist()


def _read_logits(accelerator, logits, total):
    """All logits on the CPU of every process. logits: (total, classes), or None without a batch.

    Each sample is one process's, and zero on the others: so the sum over the processes is exact.
    """
    if accelerator.num_processes > 1:
        classes = logits.shape[1] if accelerator.is_main_process else 0  # it always has a batch
        classes = accelerator.reduce(torch.tensor(classes, device=accelerator.device), "sum").item()
        if logits is None:
            logits = torch.zeros(total, classes, device=accelerator.device)
        logits = accelerator.reduce(logits, "sum")
    return logits.cpu()


def evaluate_epoch(run, network, splits, prepare):
    """{"val/acc": …, "val/acc_ema": …} at the end of an epoch: of test without val, else nothing.

    run: a Run. network: what sees the samples of `splits`: the run's module, or a part of it.
    prepare: as for `evaluate`.
    """
    split = "val" if "val" in splits else "test"
    if split not in splits:
        return {}

    def once():
        return evaluate(
            run.accelerator, network, splits[split], prepare, stop=run.asked_to_stop,
            metrics=computed(run.options.metrics, run.options.select_by),
        )  # fmt: skip

    return {f"{split}/{name}": value for name, value in score(run.module, run.ema, once).items()}


def evaluate_result(run, split, prepare, tta_views=None):
    """({metric: value}, logits) of the weights in the run's network: see `Run.finish`.

    split: Samples. prepare, tta_views: as for `evaluate`.
    """
    return evaluate(
        run.accelerator, run.module, split, prepare, tta_views, run.asked_to_stop,
        metrics=computed(run.options.metrics, run.options.select_by), whole=True,
    )  # fmt: skip


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

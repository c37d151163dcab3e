"""Evaluation that counts every sample exactly once, the same at any number of processes."""

from __future__ import annotations

import torch

from harness.errors import StopAsked
from harness.metrics import ALWAYS, METRICS, computed
from harness.processes import from_main
from tricks.tta import average_views

BATCH = (64, 256)  # fewest and most samples of an evaluation batch
BATCH_PIXELS = 2**21  # pixels of an evaluation batch, within these limits


def batch_starts(split) -> range:
    """Where the evaluation batches of Samples start; the same however many processes share them."""
    pixels = split.stored.shape[1:].numel() // 3
    step = min(max(BATCH_PIXELS // max(pixels, 1), BATCH[0]), BATCH[1])
    return range(0, len(split.labels), step)


def evaluate(
    accelerator, model, split, prepare, tta_views=None, stop=None, metrics=ALWAYS, with_logits=False
):
    """{name: value} of the metrics of `model` on one split.

    model: the unwrapped module. split: harness.data.stores.Samples. prepare: uint8 batch on the
    device -> what the network takes. tta_views: of tricks.tta, whose probabilities are averaged;
    None for the image as it is. stop: a function without arguments -> a number over 0 after a
    signal to this process (`Run.asked_to_stop`). metrics: names in harness.metrics.METRICS.
    with_logits: return ({name: value}, logits), all logits in the order of the samples, float32
    (n, classes) on the CPU.

    The samples are cut into fixed batches by index, which are shared out to the processes in turn;
    each batch has its own sums, added in the order of the batches. So there is no padding and no
    duplicate, and the result does not depend on how many processes share the work. Raises
    StopAsked, on all processes, after a signal to one.
    """
    total = len(split.labels)
    summed = [name for name in metrics if METRICS[name].batch_sum]
    of_all = [name for name in metrics if METRICS[name].of_all]
    keeps_logits = with_logits or bool(of_all)
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
    return (scores, logits) if with_logits else scores


@torch.inference_mode()
def _forward(accelerator, model, split, prepare, tta_views, stop, summed, keeps_logits):
    """(sums of each batch (batches, summed + samples + stop), logits (n, classes) or None).

    Both on the device, and zero for the batches of other processes.
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
                batch_logits = model(prepare(images)).float()
            else:
                views = [model(prepare(view.apply(images, index))).float() for view in tta_views]
                weights = [view.weight for view in tta_views]
                batch_logits = average_views(torch.stack(views), weights, check=False)
        values = torch.stack([METRICS[n].batch_sum(batch_logits, labels).float() for n in summed])
        # new_full writes on the device; new_tensor would copy from the host, and wait for the copy
        sums[k, :-1] = torch.cat([values, values.new_full((1,), len(labels))])
        if keeps_logits:
            if logits is None:
                logits = batch_logits.new_zeros(total, batch_logits.shape[1])
            logits[starts[k] : starts[k] + len(index)] = batch_logits
    for module, training in modes:
        module.training = training
    if stop:
        sums[0, -1].fill_(stop())
    return sums, logits


def _read_sums(accelerator, sums):
    """The sums over all batches and processes as numbers; only here an evaluation waits."""
    return accelerator.reduce(sums, "sum").cpu().double().sum(0).tolist()


def _read_logits(accelerator, logits, total):
    """All logits on the CPU of every process. logits: (total, classes), or None without a batch.

    Each sample belongs to one process and is zero on the others: the sum over them is exact.
    """
    if accelerator.num_processes > 1:
        classes = logits.shape[1] if accelerator.is_main_process else 0  # it always has a batch
        classes = accelerator.reduce(torch.tensor(classes, device=accelerator.device), "sum").item()
        if logits is None:
            logits = torch.zeros(total, classes, device=accelerator.device)
        logits = accelerator.reduce(logits, "sum")
    return logits.cpu()


def evaluate_epoch(run, network, splits, prepare):
    """{"val/acc": …, "val/acc_ema": …} at the end of an epoch: of val, else of test, else {}.

    run: a Run. network: the run's module, or the part of it that takes the samples of `splits`.
    prepare: as for `evaluate`.
    """
    split = "val" if "val" in splits else "test"
    if split not in splits:
        return {}

    def evaluate_weights():
        return evaluate(
            run.accelerator, network, splits[split], prepare, stop=run.asked_to_stop,
            metrics=computed(run.options.metrics, run.options.select_by),
        )  # fmt: skip

    scores = score(run.module, run.ema, evaluate_weights)
    return {f"{split}/{name}": value for name, value in scores.items()}


def evaluate_result(run, split, prepare, tta_views=None):
    """({metric: value}, logits) of the weights that the run's network holds: see `Run.finish`.

    split: Samples. prepare, tta_views: as for `evaluate`.
    """
    return evaluate(
        run.accelerator, run.module, split, prepare, tta_views, run.asked_to_stop,
        metrics=computed(run.options.metrics, run.options.select_by), with_logits=True,
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

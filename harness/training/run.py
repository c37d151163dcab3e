"""A run: its folder, its steps, its checkpoints, its numbers. What is mechanical in every script.

The script's loop holds what is learned from a batch; around it, `Run` resumes where the run was,
makes the processes agree before every update, stops on signals and non-finite numbers, writes
metrics, checkpoints and the result, and evaluates at the end of epochs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import time
from collections import deque

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from harness.cli import flags
from harness.counters import seed_of
from harness.data.batches import DRAWS
from harness.errors import RunStopped, StopAsked, UserError
from harness.files import DIGEST, replace_file, result_bytes
from harness.models.weights import clean_state_dict
from harness.pictures import save_curves
from harness.processes import from_each, from_main, on_main
from harness.tracking import Tracking, parse_report_to
from harness.training import state
from harness.training.checkpoint import CheckpointWriter, checkpoints
from harness.training.folder import (
    claim_folder,
    git_commit,
    note_checkpoint,
    still_held,
    versions,
)
from harness.training.metrics import read_metrics
from harness.training.optimizers import withholds_on_device

# On a GPU the check of step t is read while step t + 2 is queued, so that the host never waits for
# the device; the update itself was already withheld there (see `agree`).
GPU_LAG = 2

# With --nonfinite skip: so many non-finite steps in a row, and the run stops all the same.
MOST_SKIPPED = 10

UNWRITTEN = "the result could not be written"

# Signals as numbers whose sum over the processes still says which there were; and that the run's
# folder is gone, which is no signal.
GONE = "gone"
STOP = {signal.SIGINT: 1.0, signal.SIGTERM: 1e6, GONE: 2.0**40}
# What batch systems send before they kill, and a closed ssh
AS_SIGTERM = [
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGXCPU") if hasattr(signal, name)
]
STOP |= dict.fromkeys(AS_SIGTERM, STOP[signal.SIGTERM])


def check_batch(args, processes, train_size, mixing):
    """The images of one forward pass, --batch_size over processes and accumulation steps.

    Raises UserError where the batch cannot be cut into equal parts, or train cannot fill it.
    """
    parts = processes * args.gradient_accumulation_steps
    what = f"{processes} processes × {args.gradient_accumulation_steps} accumulation steps"
    if args.batch_size % parts:
        raise UserError(f"--batch_size {args.batch_size} does not divide by {what} = {parts}")
    part = args.batch_size // parts
    if mixing and parts > 1 and part % 2:
        raise UserError(
            f"--batch_size {args.batch_size} over {what} is {part} images a part, an odd number: "
            "mixing pairs neighbours, so choose an even part (or --mix_prob 0)"
        )
    if train_size < args.batch_size:
        raise UserError(f"--batch_size {args.batch_size} is over the {train_size} train images")
    return part


class Run:
    """One training run of one script.

    args: the parsed flags. folder: from `check_folder`. model and optimizer: prepared or plain;
    the optimizer holds every parameter that will ever be trained. ema: a ModelEma or None.
    total: optimizer steps; per_epoch: those of one epoch. config: what the result is
    (config.json). identity: facts about the data that a resumed run must share.
    """

    def __init__(
        self, args, accelerator, folder, model, optimizer, ema, *, total, per_epoch, config,
        identity,
    ):  # fmt: skip
        self.args, self.accelerator, self.folder = args, accelerator, folder
        self.ema, self.config, self.main = ema, config, accelerator.is_main_process
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.module = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.total, self.steps_per_epoch = total, per_epoch
        self.stage = None  # what the records say, where there are several
        self.identity = {
            **{k: v for k, v in flags.to_recipe(args).items() if k not in flags.OPERATIONAL},
            "mixed_precision": accelerator.mixed_precision,
            **identity,
        }
        _check_same(accelerator, self.identity)
        device = accelerator.device
        self.step, self.seconds, self.images_per_second = 0, 0.0, 0.0
        self.best, self._best_weights, self.scores = None, None, {}
        self._best_on_disk = None  # which of `best` model.safetensors is, on the main process
        self._writer = CheckpointWriter()
        self.nonfinite = self._in_a_row = 0  # steps skipped
        self._skips = args.nonfinite == "skip"
        self._buffers = [buffer for buffer in self.module.buffers() if buffer.numel()]
        self._interval = torch.zeros(
            len(state.SUMS) + 1, device=device
        )  # sums and their number of steps
        self._epoch = torch.zeros(len(state.SUMS) + 1, device=device)
        self._now = torch.zeros(2, device=device)  # loss and accuracy of the step under way
        self._unread = deque()
        self._signal = None  # what this process was sent
        self._stop = 0  # what all processes agreed on
        self.unscored = None  # of an epoch that has ended and is not evaluated
        self._checkpoint_of = None  # the step of the last checkpoint
        self._shown = False
        self.picture = folder / "train_batch.png"
        self._norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        self._statistics = [
            b for m in self._norms for b in (m.running_mean, m.running_var) if b is not None
        ]

        resumed = self._resume() if args.resume_from_checkpoint else None
        self._threads = from_each(accelerator, torch.get_num_threads)
        self._lock, self._records = on_main(
            accelerator,
            lambda: claim_folder(
                folder, args, self.step if resumed else None, f"{config['job_type']}.py",
                resumed and resumed.get("metrics"), self.say,
            ),
            "the run's folder could not be made ready",
        ) or (None, None)  # fmt: skip
        if self.best:  # the result may be of a later one, if the run was killed
            best = self.best, self._best_weights
            on_main(accelerator, lambda: self._write_best(*best), UNWRITTEN)
        self.tracking = Tracking(
            accelerator, parse_report_to(args.report_to), folder=folder, project=args.project,
            name=folder.name, group=args.group, job_type=config["job_type"],
            tags=[config["dataset"], config["architecture"]], config=flags.to_recipe(args),
            run_id=resumed and resumed["run_id"],
        )  # fmt: skip
        self.say(f"tracking     {self.tracking.line}")
        self._handlers = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT, *AS_SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup's
        }
        self._bar = tqdm(
            total=total, initial=self.step, unit="step", dynamic_ncols=True,
            disable=not (self.main and sys.stderr.isatty()),
        )  # fmt: skip
        self._since = self._checkpointed = time.perf_counter()

    # ---------------------------------------------------------------- the steps

    def steps(self, batches, evaluate, spacing=0):
        """Yield (step, parts of the batch) for every optimizer step that `batches` has.

        batches: a function of the first step -> iterator of batches. evaluate: a function
        without arguments -> {"val/acc": ...}, called at the end of epochs. spacing: seconds that
        lie between checkpoints at the least, where an epoch takes less than writing one.
        """
        self._first_step, self._spacing = self.step, spacing
        self._epoch_began, self._epoch_images = time.perf_counter(), 0
        if self.unscored:  # the checkpoint was written before its epoch was evaluated
            self._score_epoch(evaluate)
        for batch in batches(self.step):
            # Dropout and whatever else the step draws on the device
            torch.manual_seed(
                seed_of(self.args.seed, "step", self.step, self.accelerator.process_index)
            )
            if self._skips:
                self._buffers_before = state.copy_by_kind(self._buffers)
            yield self.step, batch
            if self._skips:
                self._put_averages_back()
            self.step += 1
            self._epoch_images += self.args.batch_size
            self._bar.update()
            self._after_step(evaluate)
        self._read_checks(0)

    def count(self, loss, mixed_acc):
        """Add one part of the batch: its mean loss and mean accuracy, tensors on the device."""
        part = torch.stack([loss.detach().float(), mixed_acc.detach().float()])
        self._now += part / self.args.gradient_accumulation_steps

    def agree(self, grad_norm):
        """Between backward and update: what all processes must agree on.

        Loss, accuracy and BatchNorm's running statistics are averaged over the processes, and a
        signal to one is a signal to all. A non-finite loss or gradient anywhere stops the run on
        every process before this step's update; with --nonfinite skip, only the step is lost.
        """
        # Filled there: new_tensor would copy from the host's memory, and wait for the device
        stop = self._now.new_full((1,), self.asked_to_stop())
        vector = torch.cat([self._now, grad_norm.detach().float().reshape(1), stop])
        self._now = torch.zeros_like(self._now)
        if self.accelerator.num_processes > 1:
            self._check_used()
            vector = self._average_over_processes(vector)
        scaler = self.accelerator.scaler
        finite = torch.isfinite(vector[:1] if scaler else vector[:-1]).all()
        if self._statistics:  # an activation that overflows may leave the loss as it is
            norms = torch._foreach_norm(self._statistics)
            finite = finite & torch.isfinite(torch.stack(norms)).all()
        # fp16 gradients overflow now and then; the scaler skips those updates
        counted = vector[:-1].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * finite
        for sums in (self._interval, self._epoch):
            sums[:-1] += counted
            sums[-1] += finite
        on_device = withholds_on_device(self.optimizer, vector.device) and not scaler
        if on_device:  # the optimizer leaves the update out where this is 1: no host sync needed
            self.optimizer.found_inf = (~finite).float()
        if self._skips:
            self._withhold(~finite, on_device)
        host = torch.cat([vector, finite.float().reshape(1)])
        event = None
        if host.device.type == "cuda":
            host = host.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._unread.append((self.step, host, event))
        self._read_checks(GPU_LAG if event and (on_device or scaler) else 0)

    def _withhold(self, bad, on_device):
        """Let a bad step leave no trace. bad: a boolean on the device.

        BatchNorm's running statistics, and whatever else the forward pass keeps, are put back at
        once; the averages when the script has taken the unchanged weights into them.
        """
        # A fused SGD whose first update is withheld would leave its momentum uninitialised
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        begun = all(self.optimizer.state.get(p) for p in parameters if p.grad is not None)
        on_host = not (on_device and begun)
        self._bad = None if on_host and not bad else bad
        if self._bad is None:
            return
        state.put_back(self._buffers, self._buffers_before, bad)
        if self.ema:
            self._averages_before = state.copy_by_kind(self.ema.tensors().values())
        if on_host:
            self.optimizer.zero_grad()  # an optimizer passes by what has no gradient

    def _put_averages_back(self):
        if self.ema and self._bad is not None:
            state.put_back(self.ema.tensors().values(), self._averages_before, self._bad)

    def _check_used(self):
        parameters = self.module.named_parameters() if self.step == self._first_step else ()
        unused = [name for name, p in parameters if p.requires_grad and p.grad is None]
        if unused:
            raise UserError(
                f"{len(unused)} parameters take no part in the loss ({', '.join(unused[:3])}): "
                "data-parallel training would wait for their gradients; use one process"
            )

    def _average_over_processes(self, vector):
        moving = [m for m in self._norms if m.training]  # the others must not move by a bit
        buffers = [b for m in moving for b in (m.running_mean, m.running_var) if b is not None]
        flat = torch.cat([vector, *(b.float().flatten() for b in buffers)])
        torch.distributed.all_reduce(flat)
        stop = flat[len(vector) - 1].clone()
        flat /= self.accelerator.num_processes
        state.write_back(buffers, flat[len(vector) :])
        return torch.cat([flat[: len(vector) - 1], stop.reshape(1)])

    def _read_checks(self, lag):
        while len(self._unread) > lag:
            step, host, event = self._unread.popleft()
            if event:
                event.synchronize()
            loss, _, norm, stop, finite = host.tolist()
            self._in_a_row = 0 if finite else self._in_a_row + 1
            if not finite:
                self._nonfinite(step + 1, loss, norm)
            self._heed(stop, step + 1)

    def _heed(self, stop, next_step):
        """stop: the sum of what the processes were asked."""
        if stop >= STOP[GONE]:
            self.fail(
                f"{self.folder} was removed while this run was writing to it, or another run "
                f"has it: stopped before step {next_step}"
            )
        if stop:
            self._stop = signal.SIGTERM if stop >= STOP[signal.SIGTERM] else signal.SIGINT

    def asked_to_stop(self):
        """A number over 0 once this process was sent a signal: for `interruptible` work."""
        return STOP.get(self._signal, 0.0)

    def interruptible(self, work):
        """`work()`; after a signal, which it may raise as StopAsked, the run is left in good order.

        Its checkpoint is the one of the last step, so that a resumed run does the work again.
        """
        try:
            return work()
        except StopAsked as stop:
            self._heed(stop.sum_of_signals, self.step + 1)
        if self.step and self._checkpoint_of != self.step:
            self._checkpoint(must=True)
        self._wait_for_checkpoint()
        self._leave()

    def _nonfinite(self, step, loss, norm):
        if not self._skips or self._in_a_row == MOST_SKIPPED:
            self._stop_nonfinite(step, loss, norm)
        self.nonfinite += 1
        if self.nonfinite == 1:
            self.say(
                f"warning: step {step}: loss is {loss:.4g}, gradient norm is {norm:.4g}; skipped, "
                "as others will be (train/nonfinite counts them)"
            )

    def _stop_nonfinite(self, step, loss, norm):
        self._settle()
        self.accelerator.wait_for_everyone()
        kept = checkpoints(self.folder / "checkpoints")
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        others = ", BatchNorm's statistics are not finite" if math.isfinite(loss + norm) else ""
        skipped = f" and after {self._in_a_row - 1} skipped ones" if self._in_a_row > 1 else ""
        self.fail(
            f"step {step}: loss is {loss:.4g}, gradient norm is {norm:.4g}{others}; stopped before "
            f"the update{skipped}, {last}; a lower --lr or --mixed_precision no may help"
        )

    def fail(self, reason):
        """Leave in good order with an error; on all processes, or on none."""
        self._bar.close()
        self._close(exit_code=1)
        raise RunStopped(reason)

    def _after_step(self, evaluate):
        args = self.args
        if self._writer.done():
            self._settle()
        end_of_epoch = self.step % self.steps_per_epoch == 0 or self.step == self.total
        # Once an epoch at least: the last multiple of the interval may lie before this epoch
        epoch_began = (self.step - 1) // self.steps_per_epoch * self.steps_per_epoch
        logged = self.step // args.logging_steps * args.logging_steps
        none_yet = end_of_epoch and logged <= epoch_began
        if logged == self.step or none_yet or self.step == self.total:
            self._log_interval()
        if end_of_epoch:
            self._end_epoch()
        every = args.checkpointing_steps
        due = every != "epoch" and self.step % every == 0
        if every == "epoch" and end_of_epoch:
            due = not self._spacing or self._long_enough()
        stopping = self._stop or self.step == args.stop_after
        if due or stopping or self.step == self.total:
            self._read_checks(0)
            self._checkpoint(must=bool(self._stop))
        if self._stop and self.step < self.total:
            self._leave()
        if self.unscored:  # after its checkpoint, which may take as long
            self._score_epoch(evaluate)
        if stopping and self.step < self.total:
            self._wait_for_checkpoint()
            self._leave()

    def _long_enough(self):
        """Whether the last checkpoint is `spacing` seconds old: by one clock, for all processes."""
        return from_main(
            self.accelerator, lambda: time.perf_counter() - self._checkpointed >= self._spacing
        )

    def _log_interval(self):
        self._read_checks(0)
        loss, mixed_acc, norm, steps = self._interval.tolist()
        self._interval.zero_()
        record, loss = {}, loss / steps if steps else math.nan
        if steps:  # else all were skipped
            record["train/loss"] = loss
            record["train/mixed_acc"] = mixed_acc / steps
            record["train/grad_norm"] = norm / steps
        record |= self._learning_rates()
        if self._skips:
            record["train/nonfinite"] = self.nonfinite
        if self.accelerator.scaler:
            record["train/loss_scale"] = self.accelerator.scaler.get_scale()
            if record["train/loss_scale"] < 1:
                self._stop_nonfinite(self.step, loss, math.nan)
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if self._bar.disable and time.perf_counter() - self._said > 30:  # no bar: a sign of life
            self.say(f"step {self.step:>6} of {self.total}  loss {loss:.4f}")
        self._record(record)

    def _learning_rates(self):
        groups = self.optimizer.param_groups
        rates = {g["lr"] for g in groups}
        if len(rates) == 1 and not self.stage:
            return {"train/lr": rates.pop()}
        return {f"train/lr/{g.get('label', g['name'])}": g["lr"] for g in groups}

    def _end_epoch(self):
        loss, mixed_acc, _, steps = self._epoch.tolist()  # waits for the device
        self._epoch.zero_()
        speed = self._epoch_images / (time.perf_counter() - self._epoch_began)
        epoch = math.ceil(self.step / self.steps_per_epoch)
        loss, mixed_acc = (loss / steps, mixed_acc / steps) if steps else (math.nan, math.nan)
        values = epoch, loss, mixed_acc, steps, speed
        self.unscored = dict(zip(state.UNSCORED, values, strict=True))

    def _score_epoch(self, evaluate):
        epoch, loss, mixed_acc, steps, speed = self.unscored.values()
        record = {"epoch/loss": loss, "epoch/mixed_acc": mixed_acc} if steps else {}
        scores = {}
        if epoch % self.args.eval_epochs == 0 or self.step == self.total:
            self._read_checks(0)
            self.scores = scores = self.interruptible(evaluate)
            self._keep_best(epoch)
        self.unscored = None
        self._record(record | scores)
        self.seconds += time.perf_counter() - self._since
        self.images_per_second = speed
        self._since = self._epoch_began = time.perf_counter()
        self._epoch_images = 0
        words = score_words(scores, self.config["data"]["splits"])
        self.say(
            f"epoch {epoch:>3}  step {self.step:>6}  loss {loss:.4f}  "
            f"mixed_acc {mixed_acc:6.2%}  {words}"
            f"{speed:,.0f} images/s  {self.seconds:,.0f} s"
        )

    def _keep_best(self, epoch):
        key = "val/acc_ema" if self.ema else "val/acc"
        accuracy = self.scores.get(key)
        if accuracy is None or not math.isfinite(self.scores[key.replace("acc", "loss")]):
            return
        if self.best is None or accuracy > self.best["scores"][key]:
            self.best = {"epoch": epoch, "step": self.step, "scores": self.scores}
            self._best_weights = self._result_weights()
            if self.main and self._checkpoint_of == self.step:
                best = self.best, self._best_weights
                self._writer.add(lambda: self._write_best(*best))

    # ---------------------------------------------------------------- what it writes

    def say(self, line):
        """One line on the main process, above the progress bar."""
        self._said = time.perf_counter()
        if self.main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def wants_picture(self):
        """True once, on the main process: for the first batch that this process sees."""
        wanted = self.main and not self._shown
        self._shown = True
        return wanted

    def _record(self, record):
        stage = {"stage": self.stage} if self.stage else {}
        place = {"step": self.step, "epoch": self.step / self.steps_per_epoch, **stage}
        record = place | record
        if self.main and self._has_folder():
            self._records.add(record)
            self.tracking.log(record, self.step)

    def _has_folder(self):
        """Whether the folder is still this run's; if not, all stop before the next update."""
        if not still_held(self.folder, self._lock):
            self._signal = GONE
        return self._signal != GONE

    def _check_has_folder(self):
        if not self._has_folder():
            raise OSError(f"{self.folder} was removed, or another run has it")

    def _checkpoint(self, must):
        """Begin to write one, in the background; wait for it where it must be there."""
        if self.main:
            self._settle()
            self._start_checkpoint()
        if must:
            self._wait_for_checkpoint()
        self._checkpointed, self._checkpoint_of = time.perf_counter(), self.step

    def _wait_for_checkpoint(self):
        failure = f"the checkpoint of step {self.step} could not be written"
        on_main(self.accelerator, self._writer.wait, failure)

    def _start_checkpoint(self):
        counters = {
            "step": self.step,
            "identity": self.identity,
            "draws": DRAWS,
            "interval": self._interval.tolist(),
            "epoch": self._epoch.tolist(),
            "nonfinite": [self.nonfinite, self._in_a_row],
            "threads": self._threads,
            "scores": self.scores,
            "unscored": self.unscored,
            "best": self.best,
            "seconds": self.seconds + time.perf_counter() - self._since,
            "run_id": self.tracking.run_id,
            "metrics": self._records.state(),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
        }
        tensors = state.gather_tensors(self.module, self.optimizer, self.ema)
        counters["moments"] = len(tensors["optimizer"])
        best, weights = self.best, self._best_weights
        tensors |= {"best": weights} if best else {}

        def first():
            self._check_has_folder()
            self._records.sync()

        def then():
            note_checkpoint(self.folder, step)
            # The result follows the checkpoint that has it, or that a resumed run finds it from:
            # it may not fall behind
            self._write_best(best, weights)

        step = self.step
        self._writer.start(
            self.folder / "checkpoints", step, tensors, counters, self.args.max_checkpoints,
            first, then,
        )  # fmt: skip

    def _settle(self):
        """Wait for the checkpoint that is being written; where it failed, say so and give why."""
        try:
            self._writer.wait()
        except OSError as error:
            warning = f"warning: no checkpoint of step {self._writer.step}: {error}"
            self.say(f"{warning}; training goes on, older checkpoints are intact")
            return error

    def _result_weights(self):
        """What the run would give if it ended here: the averaged weights where there are any."""
        with self.ema.applied_to(self.module) if self.ema else contextlib.nullcontext():
            return {k: v.to("cpu", copy=True) for k, v in clean_state_dict(self.module).items()}

    def _write_best(self, best, weights):
        if best is not self._best_on_disk:
            self._write_result(weights)
        self._best_on_disk = best

    def _write_result(self, weights):
        data, digest = result_bytes(weights)
        config = self.config | {
            DIGEST: digest,
            "weights": "ema" if self.ema else "raw",
            "flags": flags.to_recipe(self.args),
            "versions": versions(),
        }
        replace_file(self.folder / "model.safetensors", data)
        replace_file(self.folder / "config.json", _json(config))

    def finish(self, test=None, facts=None, tta=None):
        """Write the result, the summary and the curves; returns the summary.

        test: a function without arguments -> {"acc", "loss"} of the weights in the model, called
        with the chosen ones where a validation split chose them. facts: what else the summary
        should say. tta: the same over several views of each image, for the scored split, called
        with the result's weights.
        """
        self._bar.close()
        weights = self._best_weights if self.best else self._result_weights()

        def write():
            failed = self._settle()
            self._check_has_folder()
            self._write_best(self.best or {}, weights)
            if failed:
                raise failed

        on_main(self.accelerator, write, "the last checkpoint or the result could not be written")
        final = dict(self.best["scores"] if self.best else self.scores)
        suffix = "_ema" if self.ema else ""
        if self.best is not None:
            self.module.load_state_dict(self._best_weights)
            scores = self.interruptible(test) if test else {}
            final |= {f"test/{k}{suffix}": v for k, v in scores.items()}
        split = next((s for s in ("test", "val") if f"{s}/acc" + suffix in final), None)
        if split and tta:
            averaged = self.ema and self.best is None
            with self.ema.applied_to(self.module) if averaged else contextlib.nullcontext():
                scores = self.interruptible(lambda: tta(split))
                final |= {f"{split}/{k}_tta": v for k, v in scores.items()}
            self.seconds += time.perf_counter() - self._since
        summary = {
            "split": split,
            "accuracy": final.get(f"{split}/acc{suffix}"),
            "loss": final.get(f"{split}/loss{suffix}"),
            "weights": "ema" if self.ema else "raw",
            "best_epoch": self.best and self.best["epoch"],
            "scores": final,
            "steps": self.step,
            "nonfinite": self.nonfinite,
            "epochs": self.step / self.steps_per_epoch,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 1),
            **(facts or {}),
            "data": self.config["data"],
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        if self.main:
            replace_file(self.folder / "summary.json", _json(summary))
            self._draw_curves()
            self.tracking.summary({**final, "seconds": self.seconds})
            if self.args.log_model:
                self.tracking.log_model(self.folder / "model.safetensors", {"scores": final})
        self._close(exit_code=0)
        return summary

    def _draw_curves(self):
        records = read_metrics(self.folder / "metrics.jsonl")
        if records:
            save_curves(self.folder / "curves.png", records)
        for picture in ("curves", "train_batch"):
            if (self.folder / f"{picture}.png").exists():
                self.tracking.log_image(picture, self.folder / f"{picture}.png", self.step)

    def _leave(self):
        """After a signal or --stop_after: the checkpoint is written, leave in good order."""
        self._bar.close()
        code = 128 + self._stop if self._stop else 0
        self.say(
            f"stopped at step {self.step} of {self.total}; continue with the same command and "
            "--resume_from_checkpoint auto"
        )
        if self.main:
            self._draw_curves()
        self._close(code)
        raise SystemExit(code)

    def _close(self, exit_code):
        self._settle()
        self.accelerator.wait_for_everyone()  # first: a tracker may take its time
        self.tracking.finish(exit_code=exit_code)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._lock:
            self._lock.close()

    def _on_signal(self, number, frame):
        if self._signal is None:
            self._signal, self._signalled = number, time.monotonic()
            line = f"{signal.Signals(number).name}: a checkpoint after this step, then the end\n"
            with contextlib.suppress(OSError):  # print is not safe in a signal handler
                os.write(1, line.encode())
        elif number == signal.SIGINT and time.monotonic() - self._signalled > 10:
            raise KeyboardInterrupt  # launchers repeat a signal at once; a person's second is later

    # ---------------------------------------------------------------- where it was

    def _resume(self):
        """Restore the checkpoint that is asked for, if there is one; returns its state.json."""
        say, asked = self.say, self.args.resume_from_checkpoint
        found = state.find_checkpoint(
            asked, self.folder, self.accelerator, say, self.args.overwrite
        )
        if found is None:
            say(f"no checkpoint yet in {self.folder}: starting from step 0")
            return None
        path, tensors, saved = found
        saved = state.check_state(path, saved)
        state.check_identity(path, saved["identity"], self.identity, self.args.given)
        state.restore_tensors(
            path, tensors, self.module, self.optimizer, self.ema, saved.get("moments")
        )
        if self.accelerator.scaler and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.best, self._best_weights = saved["best"], tensors.get("best")
        self.scores, self.unscored = saved["scores"], saved["unscored"]
        self._checkpoint_of = self.step
        self.nonfinite, self._in_a_row = saved["nonfinite"]
        self._interval += torch.tensor(saved["interval"], device=self._interval.device)
        self._epoch += torch.tensor(saved["epoch"], device=self._epoch.device)
        say(f"resuming     {path}, step {self.step} of {self.total}")
        if self.args.stop_after and self.args.stop_after <= self.step < self.total:
            say(f"stopped already: --stop_after {self.args.stop_after}")
            raise SystemExit(0)
        self._keep_threads(saved["threads"])
        return saved

    def _keep_threads(self, saved):
        """Compute on as many CPU threads as before: another number adds up in another order.

        saved: those of each process; with another number of processes the bits differ anyway.
        """
        now, rank = torch.get_num_threads(), self.accelerator.process_index
        if len(saved) == self.accelerator.num_processes and saved[rank] != now:
            torch.set_num_threads(saved[rank])
            self.say(f"threads      {saved[rank]} as before, not {now}: so the bits stay the same")


def _check_same(accelerator, identity):
    """Raise UserError unless all processes have the same flags and the same data."""
    text = {name: repr(value) for name, value in identity.items()}
    every = from_each(accelerator, lambda: (socket.gethostname(), text))
    host, first = every[0]
    for rank, (other, theirs) in enumerate(every):
        for name in first:
            if theirs.get(name) != first[name]:
                raise UserError(
                    f"process {rank} on {other} has {name} {theirs.get(name)}, process 0 on {host} "
                    f"has {first[name]}: all need the same flags and the same data"
                )


def score_words(scores, sizes):
    """`test 93.10% (ema 94.02%) of 10,000  ` for the epoch line; empty if nothing was scored."""
    words = ""
    for split in ("val", "test"):
        if f"{split}/acc" in scores:
            words += f"{split} {scores[f'{split}/acc']:.2%}"
            ema = scores.get(f"{split}/acc_ema")
            words += f" (ema {ema:.2%})" if ema is not None else ""
            words += f" of {sizes[split]:,}  "
    return words


def _json(value):
    return (json.dumps(value, indent=2) + "\n").encode()

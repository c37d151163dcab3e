"""A run: its steps, its checkpoints, where it resumes. What is mechanical in every script.

The script's loop says how a batch is learned from; around it, `Run` resumes where the run was, acts
on the guard's check of each step, writes checkpoints and evaluates at the end of epochs. It uses
harness.training.guard (what may stop a step), record (what is reported) and result.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from harness.cli import flags
from harness.counters import seed_of
from harness.data.batches import DRAWS
from harness.errors import RunStopped, StopAsked, UserError
from harness.files import replace_file
from harness.processes import check_same, from_each, from_main, on_main
from harness.tracking import TrackingOptions
from harness.training import state
from harness.training.checkpoint import CheckpointWriter, checkpoints
from harness.training.energy import EnergyMeter
from harness.training.folder import note_checkpoint, remove_checkpoints
from harness.training.guard import GONE, STOP, Signals, StepGuard
from harness.training.record import Record
from harness.training.result import Result, as_json

# With --nonfinite skip, the run stops after this many non-finite steps in a row.
MAX_SKIPPED = 10

UNWRITTEN = "the result could not be written"


class Length(NamedTuple):
    """How long a run is, in optimizer steps."""

    total: int
    per_epoch: int


@dataclass(frozen=True)
class RunOptions(TrackingOptions):
    """The flags of a run, whatever it trains."""

    seed: int
    batch_size: int
    gradient_accumulation_steps: int
    metrics: list[str] | None
    select_by: str
    eval_epochs: int
    logging_steps: int
    checkpointing_steps: int | str
    max_checkpoints: int
    keep_checkpoints: str
    nonfinite: str
    slice_by: list[str] | None
    log_model: bool
    stop_after: int | None
    overwrite: bool
    resume_from_checkpoint: str | None
    given: dict  # see Parser.read


def check_batch(batch_size, accumulation, processes, train_size, mixing):
    """The images of a microbatch: --batch_size divided by processes and accumulation steps.

    Raises UserError where the batch can't be cut into equal microbatches, or train can't fill it.
    """
    count = processes * accumulation
    product = f"{processes} processes × {accumulation} accumulation steps"
    if batch_size % count:
        raise UserError(f"--batch_size {batch_size} is not divisible by {product} = {count}")
    size = batch_size // count
    if mixing and count > 1 and size % 2:
        raise UserError(
            f"--batch_size {batch_size} over {product} is {size} images at a time, an odd number: "
            "mixing pairs neighbours, so choose an even number (or --mix_prob 0)"
        )
    if train_size < batch_size:
        raise UserError(f"--batch_size {batch_size} is more than the {train_size} train images")
    return size


class Run:
    """One training run of one script.

    options: RunOptions. folder: from `check_folder`. model and optimizer: prepared or plain;
    the optimizer holds every parameter that will ever be trained. ema: a ModelEma or None.
    config: the result's config.json. identity: facts about the data that a resumed run must share.
    """

    def __init__(
        self, options, accelerator, folder, model, optimizer, ema, length, config, identity
    ):  # fmt: skip
        self.options, self.accelerator = options, accelerator
        self.folder, self.length = folder, length
        self.ema, self.config, self.main = ema, config, accelerator.is_main_process
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.module = accelerator.unwrap_model(model, keep_torch_compile=False)
        operational = flags.named("operational")
        self.identity = {
            **{k: v for k, v in options.recipe.items() if k not in operational},
            "mixed_precision": accelerator.mixed_precision,
            **identity,
        }
        check_same(accelerator, self.identity)
        self._skips = options.nonfinite == "skip"
        self.signals = Signals()
        self.guard = StepGuard(
            accelerator, self.module, self.optimizer, ema, self._skips,
            options.gradient_accumulation_steps,
        )  # fmt: skip
        self.record = Record(accelerator, folder, length.per_epoch)
        self.result = Result(folder, options.recipe, options.select_by, config, self.module, ema)
        self.say = self.record.say
        self.asked_to_stop = self.signals.number  # over 0 after a signal: for `interruptible` work
        self.step, self.seconds, self.images_per_second = 0, 0.0, 0.0
        self.evaluation_seconds = 0.0  # of the seconds
        self.scores = {}
        self.nonfinite = self._in_a_row = 0  # steps skipped
        self._stop = 0  # the signal that all processes agreed on
        self.unscored = None  # numbers (state.UNSCORED) of an epoch that is not evaluated yet
        self._writer, self._checkpoint_of = CheckpointWriter(), None  # step of the last one
        self._shown = False
        self.picture = folder / "train_batch.png"

        resumed_state = self._resume() if options.resume_from_checkpoint else None
        self._threads = from_each(accelerator, torch.get_num_threads)
        self.energy = EnergyMeter(accelerator, resumed_state and resumed_state["energy"])
        script = f"{config['job_type']}.py"
        self.record.claim(options.recipe, options.overwrite, script, resumed_state)
        if best := self.result.best:  # the files may be of a later epoch, if the run was killed
            weights = self.result.best_weights
            on_main(accelerator, lambda: self.result.write(best, weights), UNWRITTEN)
        run_id = resumed_state and resumed_state["run_id"]
        self.record.start(options, config, length.total, self.step, run_id)
        self.signals.listen()
        self._since = self._checkpointed = time.perf_counter()

    # ---------------------------------------------------------------- the steps

    def steps(self, batches, evaluate, spacing=0):
        """Yield (step, microbatches) for every optimizer step that `batches` has.

        batches: a function of the first step -> iterator of lists of microbatches. evaluate: a
        function without arguments -> {"val/acc": ...}, called at the end of epochs. spacing: least
        seconds between two checkpoints, for epochs that take less time than writing one.
        """
        self._first_step, self._spacing = self.step, spacing
        self._epoch_began, self._epoch_images = time.perf_counter(), 0
        if self.unscored:  # the checkpoint was written before its epoch was evaluated
            self._score_epoch(evaluate)
        for batch in batches(self.step):
            # Dropout and whatever else the step draws on the device
            torch.manual_seed(
                seed_of(self.options.seed, "step", self.step, self.accelerator.process_index)
            )
            self.guard.begin_step()
            yield self.step, batch
            self.guard.end_step()
            self.step += 1
            self._epoch_images += self.options.batch_size
            self.record.bar.update()
            self._after_step(evaluate)
        self._heed_checks(0)

    def count(self, loss, mixed_acc):
        """Add one microbatch: its mean loss and mean accuracy, tensors on the device."""
        self.guard.count(loss, mixed_acc)

    def sync_step(self, grad_norm):
        """Between backward and update: what all processes must agree on (see StepGuard.sync).

        A signal to one is a signal to all. A non-finite loss or gradient anywhere stops the run
        on every process before this step's update; with --nonfinite skip, only the step is lost.
        """
        if self.step == self._first_step:
            self.guard.check_gradients()
        self.guard.sync(self.step, grad_norm, self.asked_to_stop())
        self._heed_checks(self.guard.lag)

    def _heed_checks(self, lag):
        for check in self.guard.checks(lag):
            self._in_a_row = 0 if check.finite else self._in_a_row + 1
            if not check.finite:
                self._skip_or_stop(check.step + 1, check.loss, check.grad_norm)
            self._heed_stop(check.stop, check.step + 1)

    def _heed_stop(self, stop, next_step):
        """Act on signals. stop: the sum of their numbers in STOP over the processes."""
        if stop >= STOP[GONE]:
            self.fail(
                f"{self.folder} was removed while this run was writing to it, or another run "
                f"has it: stopped before step {next_step}"
            )
        if stop:
            self._stop = signal.SIGTERM if stop >= STOP[signal.SIGTERM] else signal.SIGINT

    def interruptible(self, work):
        """`work()`; if it raises StopAsked after a signal, end the run in good order.

        The checkpoint is of the last step, so that a resumed run does the work again.
        """
        try:
            return work()
        except StopAsked as stop:
            self._heed_stop(stop.sum_of_signals, self.step + 1)
        if self.step and self._checkpoint_of != self.step:
            self._checkpoint(must=True)
        self._wait_for_checkpoint()
        self._leave()

    def _skip_or_stop(self, step, loss, norm):
        if not self._skips or self._in_a_row == MAX_SKIPPED:
            self._stop_nonfinite(step, loss, norm)
        self.nonfinite += 1
        if self.nonfinite == 1:
            self.say(
                f"warning: step {step}: loss is {loss:.4g}, gradient norm is {norm:.4g}; skipped, "
                "as later ones will be (train/nonfinite counts them)"
            )

    def _stop_nonfinite(self, step, loss, norm):
        self._settle()
        self.accelerator.wait_for_everyone()
        paths = checkpoints(self.folder / "checkpoints")
        hint = f"the last good checkpoint is {paths[-1]}" if paths else "there is no checkpoint yet"
        statistics = ", BatchNorm's statistics are not finite" if math.isfinite(loss + norm) else ""
        skipped = f" and after {self._in_a_row - 1} skipped ones" if self._in_a_row > 1 else ""
        self.fail(
            f"step {step}: loss is {loss:.4g}, gradient norm is {norm:.4g}{statistics}; stopped "
            f"before the update{skipped}, {hint}; a lower --lr or --mixed_precision no may help"
        )

    def fail(self, reason):
        """End the run in good order with an error. Called on all processes, or on none."""
        self.record.bar.close()
        self._close(exit_code=1)
        raise RunStopped(reason)

    def wants_picture(self):
        """True once, on the main process: for the first batch that this process sees."""
        is_first = self.main and not self._shown
        self._shown = True
        return is_first

    # ---------------------------------------------------------------- after a step

    def _after_step(self, evaluate):
        options, (total, per_epoch) = self.options, self.length
        if self._writer.done():
            self._settle()
        end_of_epoch = self.step % per_epoch == 0 or self.step == total
        # Once an epoch at least: the last multiple of the interval may lie before this epoch
        epoch_began = (self.step - 1) // per_epoch * per_epoch
        log_step = self.step // options.logging_steps * options.logging_steps
        none_yet = end_of_epoch and log_step <= epoch_began
        if log_step == self.step or none_yet or self.step == total:
            self._log_interval()
        if end_of_epoch:
            self._end_epoch()
        interval = options.checkpointing_steps
        due = interval != "epoch" and self.step % interval == 0
        if interval == "epoch" and end_of_epoch:
            due = not self._spacing or self._long_enough()
        stopping = self._stop or self.step == options.stop_after
        if due or stopping or self.step == total:
            self._heed_checks(0)
            self._checkpoint(must=bool(self._stop))
        if self._stop and self.step < total:
            self._leave()
        if self.unscored:  # after its checkpoint, because evaluation may take as long as the epoch
            self._score_epoch(evaluate)
        if stopping and self.step < total:
            self._wait_for_checkpoint()
            self._leave()

    def _long_enough(self):
        """Whether the last checkpoint is `spacing` seconds old, by the main process's clock."""
        return from_main(
            self.accelerator, lambda: time.perf_counter() - self._checkpointed >= self._spacing
        )

    def _log_interval(self):
        self._heed_checks(0)
        loss, mixed_acc, norm, steps = self.guard.interval.tolist()
        self.guard.interval.zero_()
        record, loss = {}, loss / steps if steps else math.nan
        if steps:  # not all were skipped
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
        self._heed_folder(self.record.add_interval(record, self.step, loss))

    def _learning_rates(self):
        groups = self.optimizer.param_groups
        rates = {g["lr"] for g in groups}
        if len(rates) == 1 and not self.record.stage:
            return {"train/lr": rates.pop()}
        return {f"train/lr/{g.get('label', g['name'])}": g["lr"] for g in groups}

    def _heed_folder(self, is_there):
        """Stop all processes before the next update where the folder is gone or another run's."""
        if not is_there:
            self.signals.received = GONE

    def _end_epoch(self):
        loss, mixed_acc, _, steps = self.guard.epoch.tolist()  # waits for the device
        self.guard.epoch.zero_()
        speed = self._epoch_images / (time.perf_counter() - self._epoch_began)
        epoch = math.ceil(self.step / self.length.per_epoch)
        loss, mixed_acc = (loss / steps, mixed_acc / steps) if steps else (math.nan, math.nan)
        values = epoch, loss, mixed_acc, steps, speed
        self.unscored = dict(zip(state.UNSCORED, values, strict=True))

    def _score_epoch(self, evaluate):
        epoch, scores = self.unscored, {}
        names = ("loss", "mixed_acc") if epoch["steps"] else ()
        record = {f"epoch/{name}": epoch[name] for name in names}
        if epoch["epoch"] % self.options.eval_epochs == 0 or self.step == self.length.total:
            self._heed_checks(0)
            start = time.perf_counter()
            self.scores = scores = self.interruptible(evaluate)
            self.evaluation_seconds += time.perf_counter() - start
            better = self.result.consider(epoch["epoch"], self.step, scores)
            if better and self.main and self._checkpoint_of == self.step:
                best = self.result.best, self.result.best_weights
                self._writer.add(lambda: self.result.write(*best))
        self.unscored = None
        self._heed_folder(self.record.add(record | scores, self.step))
        self.seconds += time.perf_counter() - self._since
        self.images_per_second = epoch["images_per_second"]
        self._since = self._epoch_began = time.perf_counter()
        self._epoch_images = 0
        sizes = self.config["data"]["splits"]
        self.record.say_epoch(epoch, self.step, scores, sizes, self.seconds)

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint(self, must):
        """Begin to write a checkpoint in the background. must: wait until it is written."""
        energy = self.energy.total()
        if self.main:
            self._settle()
            self._start_checkpoint(energy)
        if must:
            self._wait_for_checkpoint()
        self._checkpointed, self._checkpoint_of = time.perf_counter(), self.step

    def _wait_for_checkpoint(self):
        failure = f"the checkpoint of step {self.step} could not be written"
        on_main(self.accelerator, self._writer.wait, failure)

    def _start_checkpoint(self, energy):
        counters = {
            "step": self.step,
            "identity": self.identity,
            "draws": DRAWS,
            "interval": self.guard.interval.tolist(),
            "epoch": self.guard.epoch.tolist(),
            "nonfinite": [self.nonfinite, self._in_a_row],
            "threads": self._threads,
            "scores": self.scores,
            "unscored": self.unscored,
            "best": self.result.best,
            "seconds": self.seconds + time.perf_counter() - self._since,
            "evaluation_seconds": self.evaluation_seconds,
            "energy": energy,
            "run_id": self.record.tracking.run_id,
            "metrics": self.record.state(),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
        }
        tensors = state.gather_tensors(self.module, self.optimizer, self.ema)
        counters["moments"] = len(tensors["optimizer"])
        best, weights = self.result.best, self.result.best_weights
        tensors |= {"best": weights} if best else {}

        def on_start():
            self._check_has_folder()
            self.record.sync()

        def on_finish():
            note_checkpoint(self.folder, step)
            # The files of the result are written after a checkpoint that holds the same, or from
            # which a resumed run makes the same; they are never older than the checkpoint before
            self.result.write(best, weights)

        step = self.step
        self._writer.start(
            self.folder / "checkpoints", step, tensors, counters, self.options.max_checkpoints,
            on_start, on_finish,
        )  # fmt: skip

    def _settle(self):
        """Wait for the checkpoint that is being written; prints and returns its error, if any."""
        try:
            self._writer.wait()
        except OSError as error:
            warning = f"warning: no checkpoint of step {self._writer.step}: {error}"
            self.say(f"{warning}; training goes on, older checkpoints are intact")
            return error

    def _check_has_folder(self):
        has_folder = self.record.has_folder()
        self._heed_folder(has_folder)
        if not has_folder:
            raise OSError(f"{self.folder} was removed, or another run has it")

    # ---------------------------------------------------------------- the end

    def finish(self, predict, facts=None, tta=None, report=None, setup_seconds=None):
        """Write the result, the summary, the report and the curves; returns the summary.

        predict: a function of a split's role -> ({metric: value}, logits) of the weights in the
        model, which are the result's. It is called for test where val chose the weights, and for
        the splits whose logits the report needs. facts: further entries of the summary. tta: a
        function of a role -> {metric: value} over several views of each image, for the scored
        split. report: a function (role, logits, logits of val or None) that writes the report into
        the folder, on the main process; role and logits are None where nothing was scored.
        setup_seconds: {"start", "decoding"}, before the run.
        """
        self.record.bar.close()
        result, best = self.result, self.result.best
        weights = result.best_weights if best else result.current_weights()

        def write():
            failed = self._settle()
            self._check_has_folder()
            result.write(best or {}, weights)
            if failed:
                raise failed

        on_main(self.accelerator, write, "the last checkpoint or the result could not be written")
        if best is not None:
            self.module.load_state_dict(weights)
        with result.averaged() if best is None else contextlib.nullcontext():
            final, split, logits, val_logits = self._scores_of_result(predict, tta, bool(report))
        facts = self._facts(setup_seconds or {}) | (facts or {})
        summary = result.summarise(self.accelerator, final, facts)
        if self.main:
            replace_file(self.folder / "summary.json", as_json(summary))
            self.record.draw_curves(self.step)
        if report:
            failure = "the report could not be written"
            on_main(self.accelerator, lambda: report(split, logits, val_logits), failure)
        if self.main:
            tracking = self.record.tracking
            tracking.summary({**final, "seconds": self.seconds})
            if self.options.log_model:
                tracking.log_model(self.folder / "model.safetensors", {"scores": final})
        if self.options.keep_checkpoints == "final":
            on_main(self.accelerator, lambda: remove_checkpoints(self.folder, self.step))
        self._close(exit_code=0)
        return summary

    def _scores_of_result(self, predict, tta, reports):
        """(scores, the role of the scored split or None, its logits, the logits of val or None).

        The weights in the model are the result's. reports: whether a report needs the logits.
        """
        result, best = self.result, self.result.best
        final, logits = dict(best["scores"] if best else self.scores), None
        start = time.perf_counter()
        if best is not None and "test" in self.config["data"]["splits"]:
            scores, logits = self.interruptible(lambda: predict("test"))
            final |= {f"test/{k}{result.suffix}": v for k, v in scores.items()}
        split = result.scored_split(final)
        if split and tta:
            scores = self.interruptible(lambda: tta(split))
            final |= {f"{split}/{k}_tta": v for k, v in scores.items()}
        if split and reports and logits is None:
            logits = self.interruptible(lambda: predict(split))[1]
        val_logits = logits if split == "val" else None
        if best is not None and reports and val_logits is None:
            val_logits = self.interruptible(lambda: predict("val"))[1]
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.evaluation_seconds += seconds
        return final, split, logits, val_logits

    def _facts(self, setup_seconds):
        training = self.seconds - self.evaluation_seconds
        seconds_of = setup_seconds | {"training": training, "evaluation": self.evaluation_seconds}
        return {
            "steps": self.step,
            "nonfinite": self.nonfinite,
            "epochs": self.step / self.length.per_epoch,
            "seconds": round(self.seconds, 3),
            "seconds_of": {name: round(value, 3) for name, value in seconds_of.items()},
            **({"energy": energy} if (energy := self.energy.total()) else {}),
            "images_per_second": round(self.images_per_second, 1),
        }

    def _leave(self):
        """End the run early, after a signal or --stop_after, when its checkpoint is written."""
        self.record.bar.close()
        code = 128 + self._stop if self._stop else 0
        self.say(
            f"stopped at step {self.step} of {self.length.total}; continue with the same command "
            "and --resume_from_checkpoint auto"
        )
        if self.main:
            self.record.draw_curves(self.step)
        self._close(code)
        raise SystemExit(code)

    def _close(self, exit_code):
        self._settle()
        self.accelerator.wait_for_everyone()  # before the trackers, which may take long
        self.energy.close()
        self.record.close(exit_code)
        self.signals.restore()

    # ---------------------------------------------------------------- where it was

    def _resume(self):
        """Restore the checkpoint to resume from, if there is one; returns its state.json."""
        say, source = self.say, self.options.resume_from_checkpoint
        checkpoint = state.find_checkpoint(
            source, self.folder, self.accelerator, say, self.options.overwrite
        )
        if checkpoint is None:
            say(f"no checkpoint yet in {self.folder}: starting from step 0")
            return None
        path, tensors, saved_state = checkpoint
        saved_state = state.check_state(path, saved_state)
        state.check_identity(path, saved_state["identity"], self.identity, self.options.given)
        state.restore_tensors(
            path, tensors, self.module, self.optimizer, self.ema, saved_state.get("moments")
        )
        if self.accelerator.scaler and saved_state["scaler"]:
            self.accelerator.scaler.load_state_dict(saved_state["scaler"])
        self.step, self.seconds = saved_state["step"], saved_state["seconds"]
        self.evaluation_seconds = saved_state["evaluation_seconds"]
        self.result.best, self.result.best_weights = saved_state["best"], tensors.get("best")
        self.scores, self.unscored = saved_state["scores"], saved_state["unscored"]
        self._checkpoint_of = self.step
        self.nonfinite, self._in_a_row = saved_state["nonfinite"]
        for sums, name in ((self.guard.interval, "interval"), (self.guard.epoch, "epoch")):
            sums += torch.tensor(saved_state[name], device=sums.device)
        say(f"resuming     {path}, step {self.step} of {self.length.total}")
        if self.options.stop_after and self.options.stop_after <= self.step < self.length.total:
            say(f"stopped already: --stop_after {self.options.stop_after}")
            raise SystemExit(0)
        self._keep_threads(saved_state["threads"])
        return saved_state

    def _keep_threads(self, counts):
        """Compute on as many CPU threads as before: another number would add in another order.

        counts: of each process, from the checkpoint. With another number of processes the bits
        differ anyway.
        """
        threads, rank = torch.get_num_threads(), self.accelerator.process_index
        if len(counts) == self.accelerator.num_processes and counts[rank] != threads:
            torch.set_num_threads(counts[rank])
            self.say(f"threads      {counts[rank]} as before, not {threads}: for the same bits")

"""What a run reports: lines on the terminal, the progress bar, metrics.jsonl and the trackers."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from harness.metrics import scores_in_words
from harness.pictures import save_curves
from harness.processes import on_main
from harness.tracking import Tracking
from harness.training.folder import claim_folder, still_held
from harness.training.metrics_file import read_metrics

SIGN_OF_LIFE = 30  # seconds after which a run without a bar prints its step


class Record:
    """The record of one run. `start` is called before anything but `say` and `claim`.

    folder: of the run. per_epoch: optimizer steps. `stage`: the name of the stage in the records of
    a run that has several, else None.
    """

    def __init__(self, accelerator, folder, per_epoch):
        self.accelerator, self.folder, self.per_epoch = accelerator, folder, per_epoch
        self.main, self.stage = accelerator.is_main_process, None
        self._lock = self._file = None
        self._line_time = time.perf_counter()

    def say(self, line):
        """One line on the main process, above the progress bar."""
        self._line_time = time.perf_counter()
        if self.main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def claim(self, recipe, overwrite, script, state):
        """Claim the folder, on the main process. state: a checkpoint's state.json, or None."""
        step, metrics = (state["step"], state.get("metrics")) if state else (None, None)
        self._lock, self._file = on_main(
            self.accelerator,
            lambda: claim_folder(self.folder, recipe, overwrite, step, script, metrics, self.say),
            "the run's folder could not be made ready",
        ) or (None, None)

    def start(self, options, config, total, step, run_id):
        """Start the trackers and the bar.

        options: TrackingOptions. config: of the result. run_id: of the trackers, or None.
        """
        self.tracking = Tracking(
            self.accelerator, options, folder=self.folder, job_type=config["job_type"],
            tags=[config["dataset"], config["architecture"]], run_id=run_id,
        )  # fmt: skip
        self.say(f"tracking     {self.tracking.line}")
        self._start = step, time.perf_counter()
        self.bar = tqdm(
            total=total, initial=step, unit="step", dynamic_ncols=True,
            disable=not (self.main and sys.stderr.isatty()),
        )  # fmt: skip

    def add(self, record, step):
        """Add a record to metrics.jsonl and the trackers; False where the folder is gone."""
        stage = {"stage": self.stage} if self.stage else {}
        record = {"step": step, "epoch": step / self.per_epoch, **stage} | record
        if self.main and not self.has_folder():
            return False
        if self.main:
            self._file.add(record)
            self.tracking.log(record, step)
        return True

    def add_interval(self, record, step, loss):
        """`add`, and show the mean loss of these steps on the bar or, without one, in a line."""
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if self.bar.disable and time.perf_counter() - self._line_time > SIGN_OF_LIFE:
            time_left = self._time_left(step)
            self.say(f"step {step:>6} of {self.bar.total}  loss {loss:.4f}  {time_left}")
        return self.add(record, step)

    def _time_left(self, step):
        """How long the rest will take at the speed since `start`, as text."""
        start_step, start_time = self._start
        if step <= start_step:
            return ""
        seconds = (time.perf_counter() - start_time) / (step - start_step) * (self.bar.total - step)
        return f"about {seconds / 60:,.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"

    def say_epoch(self, epoch, step, scores, sizes, seconds):
        """The line of an epoch. epoch: as in `state.UNSCORED`. sizes: {split: images}."""
        text = scores_in_words(scores, sizes)
        self.say(
            f"epoch {epoch['epoch']:>3}  step {step:>6}  loss {epoch['loss']:.4f}  "
            f"mixed_acc {epoch['mixed_acc']:6.2%}  {text}"
            f"{epoch['images_per_second']:,.0f} images/s  {seconds:,.0f} s"
        )

    def has_folder(self) -> bool:
        """Whether the folder is still this run's. On the main process."""
        return still_held(self.folder, self._lock)

    def sync(self):
        """Force the records to the disk."""
        self._file.sync()

    def state(self):
        """What a checkpoint keeps about the records: see MetricsFile.state."""
        return self._file.state()

    def draw_curves(self, step):
        """Write curves.png, on the main process, and show the trackers the pictures."""
        records = read_metrics(self.folder / "metrics.jsonl")
        if records:
            save_curves(self.folder / "curves.png", records)
        for picture in ("curves", "train_batch"):
            if (self.folder / f"{picture}.png").exists():
                self.tracking.log_image(picture, self.folder / f"{picture}.png", step)

    def close(self, exit_code):
        self.tracking.finish(exit_code=exit_code)
        if self._lock:
            self._lock.close()

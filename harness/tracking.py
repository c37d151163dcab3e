"""Weights & Biases and TensorBoard, through Accelerate's trackers, which never stop the training.

A tracker may be absent, without network, slow or broken: training goes on, and metrics.jsonl has
everything anyway. `accelerate`, `wandb` and `tensorboard` are imported only when a run is tracked.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import queue
import secrets
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from harness.console import words_of
from harness.errors import UserError, nearest, reason_of
from harness.hub import answered_within
from harness.metrics import METRICS

TRACKERS = ("wandb", "tensorboard")
PROBE_SECONDS = 3.0  # how long W&B's server may take to answer before the run is kept offline
INIT_SECONDS = 30.0  # how long wandb.init may take with a server that answers
FINISH_SECONDS = 60.0  # how long the end of a run waits for a tracker; what is left is on disk
MODEL_SECONDS = 600.0  # the same when a model is uploaded

log = logging.getLogger(__name__)


def parse_report_to(value: str) -> list[str]:
    """`"wandb,tensorboard"` -> `["wandb", "tensorboard"]`; `"none"` -> `[]`."""
    names = words_of(value.lower())
    if names == ["none"]:
        return []
    for name in names:
        if name == "none":
            raise UserError(f'--report_to {value}: "none" stands alone')
        if name not in TRACKERS:
            hint = nearest(name, (*TRACKERS, "none")) or "; wandb, tensorboard or none"
            raise UserError(f'--report_to: no tracker is called "{name}"{hint}')
    return names


def flatten(config: dict, prefix: str = "") -> dict[str, int | float | str | bool]:
    """The plain values trackers take: nested keys become `a/b`, lists `"1,2"`, None `"none"`."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = ",".join(map(str, value))
        elif isinstance(value, int | float | str):
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat


@dataclass(frozen=True)
class TrackingOptions:
    """The flags that say where a run is tracked."""

    report_to: str
    project: str
    group: str | None
    recipe: dict  # all flags: see flags.to_recipe


class Tracking:
    """The run as the trackers of `--report_to` show it; only the main process has any.

    Everything after the start goes through one daemon thread: a tracker that hangs holds up the
    end of the run by a bounded time, never a step, and one that raises is warned about once.

    Attributes:
        run_id: W&B's id of the run, to be kept in checkpoints and given back on resume.
        line: where the run is tracked, in one line for people; empty on other processes.
    """

    def __init__(
        self,
        accelerator,
        options: TrackingOptions,
        *,
        folder: Path,
        job_type: str,
        tags: list[str],
        run_id: str | None = None,
    ):
        report_to, config = parse_report_to(options.report_to), flatten(options.recipe)
        # A sweep's agent hands its id over in the environment. Ours exists before wandb.init does.
        self.run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self.line = ""
        self._accelerator = accelerator
        self._trackers: list = []
        self._jobs: queue.SimpleQueue[Callable | None] = queue.SimpleQueue()
        self._patience = FINISH_SECONDS
        self._warned: set[str] = set()
        if not accelerator.is_main_process:
            return

        about = {"project": options.project, "name": Path(folder).name, "group": options.group}
        folder = Path(folder).resolve()
        lines = []
        if "wandb" in report_to:
            about |= {"job_type": job_type}
            about |= {"tags": [tag[:64] for tag in tags if tag]}  # W&B's limit
            lines.append(self._start_wandb(folder, config, about))
        if "tensorboard" in report_to:
            lines.append(self._start_tensorboard(folder, config))
        self.line = " · ".join(lines) or "not tracked (--report_to none)"
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, record: dict, step: int) -> None:
        """One line of metrics.jsonl. `step` is the optimizer's; records may carry "epoch" too."""
        self._put(partial(_log_record, record=dict(record), step=step))

    def log_image(self, key: str, path: Path, step: int) -> None:
        """A picture file, read a little later: don't delete it (replacing it is fine)."""
        self._put(partial(_log_image, key=key, path=Path(path), step=step))

    def log_table(self, key: str, columns: list[str], rows: list[list]) -> None:
        """A table; a Path in it is a picture file, which W&B shows and TensorBoard names."""
        self._put(partial(_log_table, key=key, columns=list(columns), rows=list(rows)))

    def summary(self, values: dict) -> None:
        """The run's final numbers (W&B only; TensorBoard has no place for them)."""
        self._put(partial(_set_summary, values=flatten(values)))

    def log_model(self, path: Path, metadata: dict) -> None:
        """The model file, with the config.json beside it, as a W&B artifact of type "model"."""
        self._patience = MODEL_SECONDS
        self._put(partial(_log_model, path=Path(path), metadata=flatten(metadata)))

    def finish(self, exit_code: int = 0) -> None:
        """Write out what is waiting, within bounds, and close the trackers. Twice is harmless."""
        if not self._trackers:
            return
        self._jobs.put(partial(_finish, exit_code=exit_code))
        self._jobs.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            log.warning("gave up waiting for the trackers; metrics.jsonl is complete")
        for tracker in self._trackers:
            self._accelerator.trackers.remove(tracker)  # or end_training() would close it again
        self._trackers = []

    def _put(self, job: Callable) -> None:
        if self._trackers:  # else no thread would ever take it out
            self._jobs.put(job)

    def _start_wandb(self, folder: Path, config: dict, about: dict) -> str:
        from accelerate.tracking import WandBTracker
        from accelerate.utils import is_wandb_available

        if not is_wandb_available():
            return "W&B is not installed (pip install wandb): not tracked there"
        try:
            import wandb

            mode, reason = decide_wandb_mode()
            settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS)
            if "finish_timeout" in type(settings).model_fields:  # newer versions only
                settings.finish_timeout = FINISH_SECONDS
            about = about | {"id": self.run_id, "resume": "allow", "mode": mode}
            project = about.pop("project")
            tracker = WandBTracker(project, dir=str(folder), settings=settings, **about)
            self._start(tracker, config)
            _define_metrics(tracker.run)
        except Exception as error:
            return f"W&B did not start ({reason_of(error)}): not tracked there"
        if mode in ("online", "shared"):
            return f"W&B: {tracker.run.url}"
        if mode == "disabled":
            return f"W&B disabled ({reason})"
        # A resumed run has several parts; the newest is being written
        run_folder = Path(tracker.run.dir).parent
        part_folders = sorted(run_folder.parent.glob(f"offline-run-*-{self.run_id}"))
        paths = " ".join(
            _short(part_folder) for part_folder in dict.fromkeys([*part_folders, run_folder])
        )
        return f"W&B offline ({reason}): `wandb sync {paths}`"

    def _start_tensorboard(self, folder: Path, config: dict) -> str:
        from accelerate.tracking import TensorBoardTracker

        try:
            self._start(TensorBoardTracker("tensorboard", folder), config)
        except Exception as error:
            return f"TensorBoard did not start ({reason_of(error)}): not tracked there"
        return f"TensorBoard: `tensorboard --logdir {_short(folder / 'tensorboard')}`"

    def _start(self, tracker, config: dict) -> None:
        # What accelerator.init_trackers does, one tracker at a time: there, the first that
        # raises takes the others with it.
        tracker.start()
        tracker.store_init_configuration(config)
        self._accelerator.trackers.append(tracker)
        self._trackers.append(tracker)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            for tracker in self._trackers:
                try:
                    job(tracker)
                except Exception as error:
                    if tracker.name not in self._warned:
                        self._warned.add(tracker.name)
                        log.warning(
                            f"{tracker.name}: {reason_of(error)}; training goes on, "
                            "metrics.jsonl is complete, more of this is not shown"
                        )


def require_tensorboard() -> None:
    """Raises UserError where TensorBoard, which is only used when asked for, is missing."""
    from accelerate.utils import is_tensorboard_available

    if not is_tensorboard_available():
        raise UserError("--report_to tensorboard: not installed; pip install tensorboard")


def decide_wandb_mode() -> tuple[str, str]:
    """W&B's mode for this process and, unless it is "online", the reason.

    Decided before the first wandb.init: with a key but no network it gives up after 101 s,
    and offline mode then fails in the same process, too (wandb #9865).
    """
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if settings.mode not in ("online", "shared"):
        reason = "WANDB_MODE" if os.environ.get("WANDB_MODE") else "W&B's settings file"
        return "disabled" if settings.mode == "disabled" else "offline", reason
    try:
        # W&B's own look-up: environment, settings file, netrc under each of the host's names.
        has_key = wandb.login(prompt=False, verify=False)
    except TypeError:  # before there was `prompt`
        has_key = bool(wandb.api.api_key)
    except wandb.Error as error:
        return "offline", f"credentials not usable: {reason_of(error)}"
    if not has_key:
        return "offline", "no credentials"
    if not answers(settings.base_url):
        return "offline", f"no answer from {urlsplit(settings.base_url).netloc}"
    return settings.mode, ""


def answers(base_url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether a W&B server answers at `base_url`, through the proxies of the environment if any.

    It is asked for its GraphQL type name, without credentials: JSON or a refusal is W&B's answer,
    a redirect, a web page or "not found" is what proxies and log-in portals put in its place.
    """
    url = base_url.rstrip("/") + "/graphql"
    query = urllib.request.Request(
        url, b'{"query": "{__typename}"}', {"Content-Type": "application/json"}
    )
    # Nothing secret is sent, and Python may lack a certificate that W&B's own core has.
    insecure = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    opener = urllib.request.build_opener(insecure)

    def send_query():
        try:
            with opener.open(query, timeout=seconds) as response:
                json.load(response)
        except urllib.error.HTTPError as error:
            return error.code in (400, 401, 403, 405)
        except (OSError, ValueError, http.client.HTTPException):
            return False  # no name, no route, no connection, no JSON
        return True

    return answered_within(seconds, send_query)


def _define_metrics(run) -> None:
    """Axes and summaries. Test numbers keep "last": a best epoch is never chosen on them."""
    run.define_metric("step")
    run.define_metric("epoch")
    run.define_metric("train/*", step_metric="step")
    for pattern in ("val/*", "test/*", "epoch/*"):
        run.define_metric(pattern, step_metric="epoch")
    for name, metric in METRICS.items():
        for weights in ("", "_ema"):
            run.define_metric(f"val/{name}{weights}", step_metric="epoch", summary=metric.best)


def _log_record(tracker, record: dict, step: int) -> None:
    if tracker.name == "wandb":
        # W&B drops points below its own step counter, as those after a resume would be. So that
        # counter is left alone, and the x axes are our "step" and "epoch" (_define_metrics).
        tracker.log(record | {"step": step})
    else:
        tracker.log({key: value for key, value in record.items() if key != "step"}, step=step)


def _log_image(tracker, key: str, path: Path, step: int) -> None:
    if tracker.name == "wandb":
        import wandb

        tracker.log({key: wandb.Image(str(path)), "step": step})
    else:
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))
        tracker.writer.add_image(key, pixels, global_step=step, dataformats="HWC")


def _log_table(tracker, key: str, columns: list[str], rows: list[list]) -> None:
    if tracker.name == "wandb":
        import wandb

        cells = [[wandb.Image(str(c)) if isinstance(c, Path) else c for c in row] for row in rows]
        tracker.log({key: wandb.Table(columns=columns, data=cells)})
    else:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
        tracker.writer.add_text(key, text)


def _set_summary(tracker, values: dict) -> None:
    if tracker.name == "wandb":
        tracker.run.summary.update(values)


def _log_model(tracker, path: Path, metadata: dict) -> None:
    if tracker.name != "wandb":
        return
    import wandb

    artifact = wandb.Artifact(f"model-{tracker.run.id}", type="model", metadata=metadata)
    for file in (path, path.with_name("config.json")):
        if file == path or file.exists():
            artifact.add_file(str(file))
    upload = tracker.run.log_artifact(artifact, aliases=["latest"])
    if not tracker.run.offline:
        upload.wait(timeout=int(MODEL_SECONDS))  # here, as finish() has less patience


def _finish(tracker, exit_code: int) -> None:
    if tracker.name == "wandb":
        tracker.run.finish(exit_code=exit_code)  # Accelerate's finish() knows no exit code
    else:
        tracker.finish()


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

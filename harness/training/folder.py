"""The folder of a run: who may have it, what stands in it, and where the numbers came from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness.cli import flags
from harness.errors import UserError
from harness.files import file_name, replace_file
from harness.tracking import parse_report_to, require_tensorboard
from harness.training.checkpoint import checkpoints

# What a run writes into its folder, and so what --overwrite may delete.
WRITTEN = (
    "config.yaml", "model.safetensors", "config.json", "summary.json", "metrics.jsonl",
    "curves.png", "train_batch.png", "checkpoints", "predictions", "wandb", "tensorboard",
)  # fmt: skip


def report_folder(args, name):
    """The folder of a report, `name` without --run_name; a report that is there is replaced.

    Raises UserError where it holds anything else, or can't be written.
    """
    _check_trackers(args)
    folder = Path(args.output_dir) / (args.run_name or name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --run_name")
    ours = folder / "report.json"
    begun = {"predictions", "panels", "config.yaml"}  # of a command that was stopped
    if folder.is_dir() and not ours.exists() and {p.name for p in folder.iterdir()} - begun:
        raise UserError(f"{folder} holds files that are not a report's: choose another --run_name")
    _check_writable(args, folder)
    return folder


def _of_sweep():
    """What tells the folders of a W&B sweep's trials apart: the agent's id of the run."""
    trial = os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""
    return f"-{file_name(trial)}" if trial else ""


def _check_trackers(args):
    if "tensorboard" in parse_report_to(args.report_to):
        require_tensorboard()


def _check_writable(args, folder):
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir {args.output_dir}: {parent} cannot be written to")


def check_folder(args):
    """The folder of this run; raises UserError where it holds another one.

    Also where --report_to names no tracker: all that can be refused is, before any long work.
    """
    _check_trackers(args)
    dataset = re.sub(r"[^\w.-]+", "_", Path(args.dataset).name or args.dataset)
    name = args.run_name or f"{dataset}-{args.model}-s{args.seed}"
    folder = Path(args.output_dir) / (name + _of_sweep())
    taken = (folder / "config.yaml").exists()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --run_name")
    if folder.is_dir() and not taken and any(p.name != ".lock" for p in folder.iterdir()):
        raise UserError(f"{folder} holds files that are not a run's: choose another --run_name")
    if (folder / "report.json").exists():
        raise UserError(f"{folder} holds a report: choose another --run_name")
    _check_writable(args, folder)
    asked = args.resume_from_checkpoint
    if asked not in (None, "auto") and folder.resolve() == Path(asked).resolve():
        raise UserError(
            f"--resume_from_checkpoint {asked} is the run's folder: give auto for its newest "
            "checkpoint, or the path of one, checkpoints/step-…"
        )
    foreign = asked not in (None, "auto") and folder.resolve() not in Path(asked).resolve().parents
    if taken and foreign and not args.overwrite:
        raise UserError(
            f"--resume_from_checkpoint {asked} is not of {folder}, which holds another run: "
            "choose another --run_name, or replace that run with --overwrite"
        )
    if taken and not asked and not args.overwrite:
        raise UserError(
            f"{folder} holds a run already: continue it with --resume_from_checkpoint auto, "
            "replace it with --overwrite, or choose another --run_name"
        )
    return folder


def claim_folder(folder, args, resumed_step):
    """Lock the folder and make it ready: cleared for a new run, cut back for a resumed one.

    resumed_step: the step of the checkpoint that the run goes on from, or None for a new run.
    Metrics of later steps are dropped, they will be written again; checkpoints of later steps are
    set aside under another name. Returns the lock, which holds
    until it is closed or the process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    if resumed_step is None:
        if (folder / "summary.json").exists() and not args.overwrite:
            raise UserError(
                f"{folder} holds a finished run without checkpoints to continue from: replace it "
                "with --overwrite, or choose another --run_name"
            )
        if checkpoints(folder / "checkpoints") and not args.overwrite:
            raise UserError(
                f"another process has trained in {folder} meanwhile: continue its run with "
                "--resume_from_checkpoint auto, or choose another --run_name"
            )
        for name in WRITTEN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # Damaged ones, or those after an older one that was named: not this run's past any more
    for late in checkpoints(folder / "checkpoints"):
        if resumed_step is not None and int(late.name[5:]) > resumed_step:
            shutil.rmtree(late.with_name(f"set-aside-{late.name}"), ignore_errors=True)
            late.rename(late.with_name(f"set-aside-{late.name}"))
    metrics = folder / "metrics.jsonl"
    kept = [r for r in read_metrics(metrics) if r["step"] <= (resumed_step or 0)]
    replace_file(metrics, "".join(json.dumps(record) + "\n" for record in kept).encode())
    replace_file(folder / "config.yaml", flags.to_yaml(args))
    return lock


def read_metrics(path):
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def versions():
    """Versions of what computes the result, as far as it is installed."""
    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "accelerate", "datasets", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def git_commit():
    """The commit of the scripts, with a + where the working tree differs; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return out.stdout.strip()
    return None


def _lock(folder):
    """Hold the folder until the process ends; raises UserError where another process does."""
    handle = open(folder / ".lock", "a+")  # noqa: SIM115  (held open on purpose)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock
        pass
    except BlockingIOError:
        handle.seek(0)
        raise UserError(f"{folder} is in use by process {handle.read() or '?'}") from None
    except OSError:  # a file system without locks
        pass
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle

"""The folder of a run or report: whose it is, what it may hold, which versions wrote it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from harness.cli import flags
from harness.console import one_line
from harness.errors import UserError, shortened
from harness.files import file_name, has_file, replace_file
from harness.models.reading import load_weights
from harness.reports import training as report
from harness.tracking import parse_report_to, require_tensorboard
from harness.training.checkpoint import checkpoints
from harness.training.metrics_file import MetricsFile

# The file that says which script has a folder and what it may write there: {"script": name,
# "written": [names], "checkpoint": the step of its first, "clearing": while --overwrite deletes}.
# It is the first file in the folder; nothing is removed that it does not list.
MARK = ".run.json"
WRITTEN_BY_RUN = (
    "model.safetensors", "config.json", "summary.json", "metrics.jsonl", "curves.png",
    "train_batch.png", "checkpoints", "predictions", "wandb", "tensorboard", "config.yaml",
    "calibration.json", "README.md", "report.html", *report.WRITTEN,
)  # fmt: skip
FILES = (".lock", MARK, *(name for name in WRITTEN_BY_RUN if "." in name))
HIDDEN_FILES = re.compile(r"\.(lock|run\.json|.*\.writing)")  # of ours, beside those of the run
METRICS_BEFORE = "metrics.before-*.jsonl"
IN_CHECKPOINTS = re.compile(r"step-\d+|set-aside-step-\d+|\.writing-.*")


@dataclass(frozen=True)
class FolderOptions:
    """The flags that say where a run or a report is written, and what it may replace."""

    output_dir: str
    run_name: str | None
    recipe: dict  # all flags: see flags.to_recipe
    report_to: str = "none"
    overwrite: bool = False
    resume_from_checkpoint: str | None = None


def report_folder(options, name, script):
    """The folder of a report: --run_name, else `name`. A report of the same script is replaced.

    options: FolderOptions. One that was made with other flags is named in a line. Raises UserError
    where the folder holds anything else, or can't be written.
    """
    _check_trackers(options)
    folder = Path(options.output_dir) / (options.run_name or name)
    _owner(folder, options.recipe, script)
    _check_writable(folder, options.output_dir)
    note = _replaced(folder, options.recipe)
    if note and os.environ.get("RANK", "0") == "0":
        print(note, flush=True)
    return folder


def _replaced(folder, recipe):
    """The line for a report that this one replaces, made with other flags; "" where none is."""
    old_flags = recipe_in(folder)
    if not old_flags:
        return ""
    new_flags = yaml.safe_load(flags.to_yaml(recipe))
    names = new_flags.keys() & old_flags.keys() - set(flags.named("operational"))
    changes = [
        f"{name} {shortened(' '.join(map(str, value)) if isinstance(value, list) else value)}"
        for name in sorted(names)
        if (value := old_flags[name]) != new_flags[name]
    ]
    if not changes:
        return ""
    return one_line(
        f"note         replaces the report in {folder}, which was made with "
        f"{', '.join(changes)}; another --run_name keeps both"
    )


def claim_report(folder, script):
    """Make the folder of a report and note in it which script it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _read_mark(folder):
        _write_mark(folder, {"script": script})


def _trial_suffix():
    """What tells the folders of a W&B sweep's trials apart: the id that the agent gives each."""
    trial = os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""
    return f"-{file_name(trial)}" if trial else ""


def _check_trackers(options):
    if "tensorboard" in parse_report_to(options.report_to):
        require_tensorboard()


def _check_writable(folder, output_dir):
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir {output_dir}: {parent} cannot be written to")


def _read_mark(folder):
    """The mark of a folder as a dict; empty where there is none or it can't be read."""
    if not has_file(folder / MARK):
        return {}
    try:
        mark = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return mark if isinstance(mark, dict) and isinstance(mark.get("script"), str) else {}


def _write_mark(folder, mark):
    replace_file(folder / MARK, json.dumps(mark).encode())


def _owner(folder, recipe, script):
    """The mark of a folder, {} of an empty one; raises UserError where it is not this script's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --run_name")
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a dangling link: {os.readlink(path)} is not there; bring it back, or "
                "choose another folder"
            )
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    for name in FILES:
        has_file(folder / name)
    mark = _read_mark(folder)
    contents = [name for name in names if not HIDDEN_FILES.fullmatch(name)]
    if not mark and contents and not _of_older_version(folder, recipe):
        raise UserError(
            f"{folder} holds files that {script} did not write, such as {contents[0]}: choose "
            "another --run_name"
        )
    if not mark and contents:
        mark = {"script": script}
    if mark and mark["script"] != script:
        raise UserError(f"{folder} holds what {mark['script']} wrote: choose another --run_name")
    return mark


def _of_older_version(folder, recipe):
    """Whether config.yaml has this script's flags: older versions wrote that and no mark."""
    old_flags = recipe_in(folder)
    return len(old_flags) > 8 and len(old_flags.keys() - recipe.keys()) < 4


def recipe_in(folder):
    """The flags in a folder's config.yaml; {} where it is missing or can't be read."""
    if not has_file(folder / "config.yaml"):
        return {}
    try:
        recipe = yaml.safe_load((folder / "config.yaml").read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def default_name(dataset, model, seed):
    """The name of a run with these flags and without --run_name."""
    dataset = re.sub(r"[^\w.-]+", "_", Path(dataset).name or dataset)
    model = re.sub(r"[^\w.-]+", "_", model)  # timm/NAME, hf-hub:owner/name
    return f"{dataset}-{model}-s{seed}"


def check_folder(options, name, script):
    """The folder of this run: --run_name, else `name`. Raises UserError where it holds another run.

    options: FolderOptions. It also raises where --report_to names no tracker, so that whatever can
    be refused is refused before any long work.
    """
    _check_trackers(options)
    folder = Path(options.output_dir) / ((options.run_name or name) + _trial_suffix())
    mark = _owner(folder, options.recipe, script)
    has_run = bool(mark) and not mark.get("clearing") and (folder / "config.yaml").exists()
    _check_writable(folder, options.output_dir)
    resume, overwrite = options.resume_from_checkpoint, options.overwrite
    finished = bool(mark) and not mark.get("clearing") and is_finished(folder)
    if finished and resume == "auto" and not overwrite:  # also where config.yaml is gone
        _check_finished(folder, options.recipe)
        return folder
    if resume not in (None, "auto") and folder.resolve() == Path(resume).resolve():
        raise UserError(
            f"--resume_from_checkpoint {resume} is the run's folder: give auto for its newest "
            "checkpoint, or the path of one, checkpoints/step-…"
        )
    is_foreign = resume not in (None, "auto")
    is_foreign = is_foreign and folder.resolve() not in Path(resume).resolve().parents
    if has_run and is_foreign and not overwrite:
        raise UserError(
            f"--resume_from_checkpoint {resume} is not of {folder}, which holds another run: "
            "choose another --run_name, or replace that run with --overwrite"
        )
    if has_run and not resume and not overwrite and is_finished(folder):
        raise UserError(
            f"{folder} holds a finished run: replace it with --overwrite, or choose another "
            "--run_name"
        )
    if has_run and not resume and not overwrite:
        raise UserError(
            f"{folder} holds a run already: continue it with --resume_from_checkpoint auto, "
            "replace it with --overwrite, or choose another --run_name"
        )
    return folder


def _check_finished(folder, recipe):
    """Raise UserError where a finished run lacks its result or had other flags than these."""
    for name in ("model.safetensors", "config.json", "summary.json"):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} holds a finished run, but {name} is not there any more: bring it back, "
                "or start anew with --overwrite"
            )
    load_weights(folder)  # raises UserError where the weights are damaged
    old_flags = recipe_in(folder)
    if not old_flags:
        raise UserError(f"{folder} holds a finished run whose config.yaml can't be read")
    new_flags = yaml.safe_load(flags.to_yaml(recipe))
    names = new_flags.keys() & old_flags.keys() - {*flags.named("operational"), "mixed_precision"}
    for name in sorted(names):
        old, new = old_flags[name], new_flags[name]
        both_paths = name == "dataset" and all(os.sep in str(value) for value in (new, old))
        if new != old and not both_paths:  # a data set may have been moved
            raise UserError(
                f"{folder} holds a finished run with --{name} {old}, this command has {new}: give "
                "another --run_name, or replace it with --overwrite"
            )


def is_finished(folder) -> bool:
    """Whether the folder's run has ended and its checkpoints were removed (--keep_checkpoints)."""
    return "finished" in _read_mark(folder)


def remove_checkpoints(folder, step):
    """Note in the folder's mark that the run is finished, then remove its checkpoints.

    To be called when the result is on the disk. If the process is killed meanwhile, some of them
    stay. Those that can't be removed are printed.
    """
    _write_mark(folder, _read_mark(folder) | {"finished": step})
    root = folder / "checkpoints"
    for path in list(root.iterdir()) if root.is_dir() else []:
        try:
            if IN_CHECKPOINTS.fullmatch(path.name):
                _remove(path)
        except OSError as error:
            print(f"note         {path} could not be removed: {error.strerror}", flush=True)
    with contextlib.suppress(OSError):  # it is a link, or holds files that no run wrote
        root.rmdir()


def is_cleared(folder) -> bool:
    """Whether --overwrite has begun to clear the folder: what it still holds does not count."""
    return bool(_read_mark(folder).get("clearing"))


def check_nothing_lost(folder):
    """Raise UserError where a run that has no checkpoint to continue from once had one."""
    mark = _read_mark(folder)
    root = folder / "checkpoints"
    reason = None
    if root.is_symlink() and not root.exists():
        reason = f"{root} is a link to {os.readlink(root)}, which is not there"
    elif root.exists() and not root.is_dir():
        reason = f"{root} is a file"
    elif mark.get("checkpoint") is not None:
        reason = f"{folder} had a checkpoint of step {mark['checkpoint']}, and has none now"
    else:
        results = [n for n in ("model.safetensors", "config.json") if (folder / n).exists()]
        if results:
            reason = f"{folder} has {' and '.join(results)}, but no checkpoint to continue from"
    if reason:
        raise UserError(f"{reason}: bring the checkpoints back, or start anew with --overwrite")


def claim_folder(folder, recipe, overwrite, resumed_step, script, metrics=None, say=print):
    """Lock the folder and make it ready: cleared for a new run, cut back for a resumed one.

    recipe: for config.yaml. overwrite: of the flag. resumed_step: the step of the checkpoint that
    the run goes on from, or None for a new run. metrics: what that checkpoint says of
    metrics.jsonl. Metrics of later steps are dropped, because they will be written again;
    checkpoints of later steps get another name. say: a function that prints a line, for what is
    missing. After a kill at any moment, the same command goes on. Returns (the lock, which holds
    until it is closed or the process ends; the MetricsFile).
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    mark = _read_mark(folder) or {"script": script, "written": WRITTEN_BY_RUN, "checkpoint": None}
    mark = {key: value for key, value in mark.items() if key != "finished"}  # not any more
    # A run of an older version wrote fewer files: one of a newer name is not the run's
    for name in set(WRITTEN_BY_RUN) - set(mark.get("written") or WRITTEN_BY_RUN):
        if (folder / name).exists():
            raise UserError(
                f"{folder} holds {name}, which its run did not write and would replace: move it "
                "away, or choose another --run_name"
            )
    if resumed_step is None and not overwrite:
        if checkpoints(folder / "checkpoints"):
            raise UserError(
                f"another process has trained in {folder} meanwhile: continue its run with "
                "--resume_from_checkpoint auto, or choose another --run_name"
            )
        if not mark.get("clearing"):
            check_nothing_lost(folder)
    if resumed_step is None and (overwrite or mark.get("clearing")):
        _write_mark(folder, mark | {"clearing": True})
        _clear(folder, mark)
        mark = mark | {"checkpoint": None}
    mark = mark | {"written": WRITTEN_BY_RUN}
    _write_mark(folder, {k: v for k, v in mark.items() if k != "clearing"})
    # Damaged ones, or those after an older one that the user named: no longer part of this run
    for path in checkpoints(folder / "checkpoints"):
        if resumed_step is not None and int(path.name[5:]) > resumed_step:
            shutil.rmtree(path.with_name(f"set-aside-{path.name}"), ignore_errors=True)
            path.rename(path.with_name(f"set-aside-{path.name}"))
    records = MetricsFile(folder / "metrics.jsonl")
    if resumed_step is None:
        aside = records.set_aside()
        if aside:
            say(f"records      of a run that had no checkpoint yet are in {aside.name}")
    elif missing := records.cut_back(resumed_step, metrics):
        say(f"warning: {missing}: the records in between are lost")
    replace_file(folder / "config.yaml", flags.to_yaml(recipe))
    return lock, records


def note_checkpoint(folder, step):
    """Note in the folder's mark that the run has had a complete checkpoint, the first at `step`."""
    mark = _read_mark(folder)
    if mark and mark.get("checkpoint") is None:
        _write_mark(folder, mark | {"checkpoint": step})


def still_held(folder, lock) -> bool:
    """Whether the folder is the one that `lock` was taken in, not removed or made anew."""
    try:
        return os.path.samestat(os.stat(folder / ".lock"), os.fstat(lock.fileno()))
    except OSError:
        return False


def _clear(folder, mark):
    """Remove what a run wrote; if no run wrote a file in checkpoints/, raise UserError before."""
    root = folder / "checkpoints"
    contents = list(root.iterdir()) if root.is_dir() else []
    foreign_names = [p.name for p in contents if not IN_CHECKPOINTS.fullmatch(p.name)]
    if foreign_names:
        raise UserError(
            f"{root} holds {foreign_names[0]}, which no run wrote: move it away, or choose another "
            "--run_name"
        )
    for path in contents:
        _remove(path)
    for name in mark.get("written") or WRITTEN_BY_RUN:
        path = folder / name
        if name == "checkpoints" and path.is_symlink() and path.is_dir():
            continue  # checkpoints are on another disk: the link stays
        if name in WRITTEN_BY_RUN:
            _remove(path)
    for path in [*folder.glob(METRICS_BEFORE), *folder.glob(".*.writing")]:
        _remove(path)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def versions():
    """Versions of the packages that compute the result, as far as they are installed."""
    numbers = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "accelerate", "datasets", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            numbers[name] = version(name)
    return numbers


def git_commit():
    """The commit of the scripts, with a + where the working tree differs; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return out.stdout.strip()
    return None


def _lock(folder):
    """Hold the folder until the process ends; raises UserError where another process does."""
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{folder / '.lock'} is a link: remove it") from None
        raise
    handle = os.fdopen(handle, "r+")
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no flock
        pass
    except BlockingIOError:
        raise UserError(f"{folder} is in use by process {handle.read(20) or '?'}") from None
    except OSError:  # a file system without locks
        pass
    handle.seek(0)
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle

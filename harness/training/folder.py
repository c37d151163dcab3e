"""The folder of a run: who may have it, what stands in it, and where the numbers came from."""

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
OURS = re.compile(r"\.(lock|run\.json|.*\.writing)")  # beside them
METRICS_BEFORE = "metrics.before-*.jsonl"
IN_CHECKPOINTS = re.compile(r"step-\d+|set-aside-step-\d+|\.writing-.*")


@dataclass(frozen=True)
class FolderOptions:
    """Where a run or a report is written, and over what. Each is a flag's name but `recipe`."""

    output_dir: str
    run_name: str | None
    recipe: dict  # all flags, as config.yaml has them
    report_to: str = "none"
    overwrite: bool = False
    resume_from_checkpoint: str | None = None


def report_folder(options, name, script):
    """The folder of a report, `name` without --run_name; a report of this script is replaced.

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
    before = _recipe_in(folder)
    if not before:
        return ""
    now = yaml.safe_load(flags.to_yaml(recipe))
    names = now.keys() & before.keys() - set(flags.named("operational"))
    changes = [
        f"{name} {shortened(' '.join(map(str, value)) if isinstance(value, list) else value)}"
        for name in sorted(names)
        if (value := before[name]) != now[name]
    ]
    if not changes:
        return ""
    return one_line(
        f"note         replaces the report in {folder}, which was made with "
        f"{', '.join(changes)}; another --run_name keeps both"
    )


def claim_report(folder, script):
    """Make the folder of a report and say whose it is."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _read_mark(folder):
        _write_mark(folder, {"script": script})


def _of_sweep():
    """What tells the folders of a W&B sweep's trials apart: the agent's id of the run."""
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
    """The mark of a folder as a dict; empty where there is none, or it can't be read."""
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
    """The folder's mark, {} where it is free; raises UserError where anything else lies there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --run_name")
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            raise UserError(
                f"{place} is a dangling link: {os.readlink(place)} is not there; bring it back, or "
                "choose another place"
            )
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    for name in FILES:
        has_file(folder / name)
    mark = _read_mark(folder)
    others = [name for name in names if not OURS.fullmatch(name)]
    if not mark and others and not _of_older_version(folder, recipe):
        raise UserError(
            f"{folder} holds files that are not of {script}, as {others[0]}: choose another "
            "--run_name"
        )
    if not mark and others:
        mark = {"script": script}
    if mark and mark["script"] != script:
        raise UserError(f"{folder} holds what {mark['script']} wrote: choose another --run_name")
    return mark


def _of_older_version(folder, recipe):
    """Whether config.yaml has this script's flags: what runs and reports wrote without a mark."""
    older = _recipe_in(folder)
    return len(older) > 8 and len(older.keys() - recipe.keys()) < 4


def _recipe_in(folder):
    """The flags in a folder's config.yaml; {} where there is none that can be read."""
    if not has_file(folder / "config.yaml"):
        return {}
    try:
        recipe = yaml.safe_load((folder / "config.yaml").read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def default_name(dataset, model, seed):
    """The name of a run without --run_name, of these flags."""
    dataset = re.sub(r"[^\w.-]+", "_", Path(dataset).name or dataset)
    model = re.sub(r"[^\w.-]+", "_", model)  # timm/NAME, hf-hub:owner/name
    return f"{dataset}-{model}-s{seed}"


def check_folder(options, name, script):
    """The folder of this run, `name` without --run_name; UserError where it holds another one.

    options: FolderOptions. Also where --report_to names no tracker: all that can be refused is,
    before any long work.
    """
    _check_trackers(options)
    folder = Path(options.output_dir) / ((options.run_name or name) + _of_sweep())
    mark = _owner(folder, options.recipe, script)
    taken = bool(mark) and not mark.get("clearing") and (folder / "config.yaml").exists()
    _check_writable(folder, options.output_dir)
    asked, overwrite = options.resume_from_checkpoint, options.overwrite
    if taken and asked == "auto" and is_finished(folder) and not overwrite:
        _check_finished(folder, options.recipe)
        return folder
    if asked not in (None, "auto") and folder.resolve() == Path(asked).resolve():
        raise UserError(
            f"--resume_from_checkpoint {asked} is the run's folder: give auto for its newest "
            "checkpoint, or the path of one, checkpoints/step-…"
        )
    foreign = asked not in (None, "auto") and folder.resolve() not in Path(asked).resolve().parents
    if taken and foreign and not overwrite:
        raise UserError(
            f"--resume_from_checkpoint {asked} is not of {folder}, which holds another run: "
            "choose another --run_name, or replace that run with --overwrite"
        )
    if taken and not asked and not overwrite and is_finished(folder):
        raise UserError(
            f"{folder} holds a finished run: replace it with --overwrite, or choose another "
            "--run_name"
        )
    if taken and not asked and not overwrite:
        raise UserError(
            f"{folder} holds a run already: continue it with --resume_from_checkpoint auto, "
            "replace it with --overwrite, or choose another --run_name"
        )
    return folder


def _check_finished(folder, recipe):
    """Raise UserError where a finished run lacks its result, or had other flags than these."""
    for name in ("model.safetensors", "config.json", "summary.json"):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} is of a finished run, and {name} is not there any more: bring it back, "
                "or start anew with --overwrite"
            )
    load_weights(folder)  # are they what was written?
    before = _recipe_in(folder)
    if not before:
        raise UserError(f"{folder} is of a finished run whose config.yaml can't be read")
    now = yaml.safe_load(flags.to_yaml(recipe))
    names = now.keys() & before.keys() - {*flags.named("operational"), "mixed_precision"}
    for name in sorted(names):
        moved = name == "dataset" and all(os.sep in str(v) for v in (now[name], before[name]))
        if now[name] != before[name] and not moved:
            raise UserError(
                f"{folder} is of a finished run with --{name} {before[name]}, here it is "
                f"{now[name]}: give another --run_name, or replace it with --overwrite"
            )


def is_finished(folder) -> bool:
    """Whether a run came to its end there and its checkpoints were removed (--keep_checkpoints)."""
    return "finished" in _read_mark(folder)


def keep_result_alone(folder, step):
    """Put down in the folder's mark that the run is finished, then remove its checkpoints.

    To be called once the result is on the disk. Killed in between, some of them stay. What can't be
    removed is named.
    """
    _write_mark(folder, _read_mark(folder) | {"finished": step})
    place = folder / "checkpoints"
    for path in list(place.iterdir()) if place.is_dir() else []:
        try:
            if IN_CHECKPOINTS.fullmatch(path.name):
                _remove(path)
        except OSError as error:
            print(f"note         {path} could not be removed: {error.strerror}", flush=True)
    with contextlib.suppress(OSError):  # what no run wrote is in it, or it is a link
        place.rmdir()


def is_cleared(folder) -> bool:
    """Whether --overwrite has begun to clear the folder, and what is left does not count."""
    return bool(_read_mark(folder).get("clearing"))


def check_nothing_lost(folder):
    """Raise UserError where a run without a checkpoint to continue from once had one."""
    mark = _read_mark(folder)
    place = folder / "checkpoints"
    why = None
    if place.is_symlink() and not place.exists():
        why = f"{place} is a link to {os.readlink(place)}, which is not there"
    elif place.exists() and not place.is_dir():
        why = f"{place} is a file"
    elif mark.get("checkpoint") is not None:
        why = f"{folder} had a checkpoint of step {mark['checkpoint']}, and has none now"
    else:
        results = [n for n in ("model.safetensors", "config.json") if (folder / n).exists()]
        if results:
            why = f"{folder} has {' and '.join(results)}, but no checkpoint to continue from"
    if why:
        raise UserError(f"{why}: bring the checkpoints back, or start anew with --overwrite")


def claim_folder(folder, recipe, overwrite, resumed_step, script, metrics=None, say=print):
    """Lock the folder and make it ready: cleared for a new run, cut back for a resumed one.

    recipe: for config.yaml. overwrite: of the flag. resumed_step: the step of the checkpoint that
    the run goes on from, or None for a new run. metrics: what that checkpoint says of
    metrics.jsonl. Metrics of later steps are dropped, they will be written again; checkpoints of
    later steps are set aside under another name. say: a function of a line, for what is missing.
    Killed at any moment, the same command goes on. Returns (the lock, which holds until it is
    closed or the process ends; the MetricsFile).
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    mark = _read_mark(folder) or {"script": script, "written": WRITTEN_BY_RUN, "checkpoint": None}
    mark = {key: value for key, value in mark.items() if key != "finished"}  # it goes on, or anew
    # A run of an older version wrote fewer files: what has such a name is somebody's own
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
    # Damaged ones, or those after an older one that was named: not this run's past any more
    for late in checkpoints(folder / "checkpoints"):
        if resumed_step is not None and int(late.name[5:]) > resumed_step:
            shutil.rmtree(late.with_name(f"set-aside-{late.name}"), ignore_errors=True)
            late.rename(late.with_name(f"set-aside-{late.name}"))
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
    """Put down in the folder's mark that a checkpoint was complete once."""
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
    """Remove what a run wrote, and raise UserError before anything for a file that it did not."""
    place = folder / "checkpoints"
    inside = list(place.iterdir()) if place.is_dir() else []
    foreign = [p.name for p in inside if not IN_CHECKPOINTS.fullmatch(p.name)]
    if foreign:
        raise UserError(
            f"{place} holds {foreign[0]}, which no run wrote: move it away, or choose another "
            "--run_name"
        )
    for path in inside:
        _remove(path)
    for name in mark.get("written") or WRITTEN_BY_RUN:
        path = folder / name
        if name == "checkpoints" and path.is_symlink() and path.is_dir():
            continue  # a disk of its own: the link stays
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

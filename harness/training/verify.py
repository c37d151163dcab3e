"""`--verify_resume`: a few steps straight and the same killed half-way and resumed, compared.

On the user's own flags, data and machine, by the script itself in processes of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from harness.cli import flags
from harness.environment import check_environment
from harness.errors import RunStopped, UserError
from harness.training.checkpoint import checkpoints, load_checkpoint
from harness.training.metrics_file import read_metrics

POLL_SECONDS = 0.05


def verify_resume(script, args):
    """Run `script` for args.verify_resume steps, twice, and print the line that says PASS.

    The second time the process gets SIGKILL once the checkpoint of the middle is there, and is
    started again. Compared are every number that was logged, after each step, and every tensor of
    the last checkpoint, bit by bit. Under a launcher each process looks after its own; the first
    one compares. Raises RunStopped with the first difference, and where a run ended with an error.
    """
    check_environment()
    if args.dry_run:
        raise UserError("--verify_resume trains, --dry_run does not: give one of them")
    steps, main = args.verify_resume, int(os.environ.get("RANK", 0)) == 0
    signal.signal(signal.SIGTERM, _leave)  # so that what is begun here is ended, too
    with tempfile.TemporaryDirectory() as mine:
        root = _shared_folder(mine)
        recipe = root / "recipe.yaml"
        if _first_here():
            recipe.write_bytes(flags.to_yaml(args))
        while not recipe.exists():
            time.sleep(POLL_SECONDS)
        command = [
            sys.executable, str(script), "--config", str(recipe), "--run_name", "run",
            "--report_to", "none", "--logging_steps", "1", "--stop_after", str(steps),
            "--checkpointing_steps", str(steps // 2), "--no_log_model",
        ]  # fmt: skip
        straight, killed = root / "straight", root / "killed"
        middle = killed / "run" / "checkpoints" / f"step-{steps // 2:08d}"
        try:
            _run([*command, "--output_dir", str(straight)], 1)
            _run([*command, "--output_dir", str(killed)], 2, kill_at=middle)
            _run([*command, "--output_dir", str(killed), "--resume_from_checkpoint", "auto"], 3)
            if main:
                print(_compare(straight / "run", killed / "run", steps))
        finally:
            if _first_here() and root.is_symlink():
                root.unlink()


def _shared_folder(mine):
    """A folder that all processes on this machine find: its first one's, by the launcher's port."""
    port = os.environ.get("MASTER_PORT")
    if port is None:
        return Path(mine)
    link = Path(tempfile.gettempdir()) / f"verify-resume-{os.getuid()}-{port}-{os.getppid()}"
    if _first_here():
        link.unlink(missing_ok=True)
        link.symlink_to(mine)
    while not link.exists():
        time.sleep(POLL_SECONDS)
    return link


def _first_here():
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def _leave(number, frame):
    raise SystemExit(128 + number)


def _run(command, number, kill_at=None):
    """One run of the script in a process of its own, killed when the folder `kill_at` is there."""
    environment = dict(os.environ)
    if "MASTER_PORT" in environment:  # the launcher's own store keeps what each run has put there
        environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + number)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    with tempfile.TemporaryFile("w+") as output:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while kill_at is not None and process.poll() is None and not kill_at.exists():
                time.sleep(POLL_SECONDS)
            if kill_at is not None:
                process.kill()
            process.wait()
        finally:  # after a signal, too
            process.kill()
            process.wait()
        if process.returncode and kill_at is None:
            output.seek(0)
            last = " / ".join(output.read().strip().splitlines()[-3:])
            raise RunStopped(
                f"--verify_resume: a run ended with status {process.returncode}: {last}"
            )


def _compare(straight, killed, steps):
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (straight, killed))
    if not ours or ours[-1]["step"] != steps:
        raise UserError(f"--verify_resume {steps}: the run ends after {ours[-1]['step']} steps")
    for one, other in zip(ours, theirs, strict=False):
        for name in {**one, **other}:
            if json.dumps(one.get(name)) != json.dumps(other.get(name)):
                raise RunStopped(
                    f"FAIL: step {one['step']}: {name} is {other.get(name)} after a kill and "
                    f"resume, {one.get(name)} without{_hint()}"
                )
    if len(ours) != len(theirs):
        raise RunStopped(
            f"FAIL: {len(theirs)} records after a kill and resume, {len(ours)} without"
        )
    (one, _), (other, _) = (
        load_checkpoint(checkpoints(folder / "checkpoints")[-1]) for folder in (straight, killed)
    )
    count = 0
    for file in one:
        for name, tensor in one[file].items():
            count += 1
            if not torch.equal(tensor, other[file][name]):
                apart = (tensor.double() - other[file][name].double()).abs().max()
                raise RunStopped(
                    f"FAIL: after step {steps}: {file} {name} differs by up to {apart:.3g}{_hint()}"
                )
    return (
        f"PASS: {steps} steps, killed and resumed at {steps // 2}: {len(ours)} records and {count} "
        "tensors are the same, bit by bit"
    )


def _hint():
    return "; try --deterministic" if torch.accelerator.is_available() else ""

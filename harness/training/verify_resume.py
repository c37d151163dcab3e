"""A few steps straight, and the same killed half-way and resumed, compared bit by bit.

    python -m harness.training.verify_resume 20 accelerate launch train.py --config mine.yaml

The number is that of the optimizer steps, what follows is any command that starts train.py or
finetune.py. It is run three times on this machine, with folders of its own: to the end; until the
checkpoint of the middle is there, when SIGKILL ends all its processes; and from there to the end.
Compared are every number that was logged, after each step, and every tensor of the last
checkpoint. The exit status is 0 for PASS.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from harness.errors import RunStopped, UserError
from harness.training.checkpoint import checkpoints, load_checkpoint
from harness.training.metrics_file import read_metrics

POLL_SECONDS = 0.05
USAGE = "python -m harness.training.verify_resume STEPS accelerate launch train.py [flags]"


def verify_resume(steps, command) -> str:
    """Run `command` for so many steps as above; the line that says PASS.

    steps: at least 2. command: a list of words. Raises RunStopped with the first difference, and
    where a run ended with an error.
    """
    with tempfile.TemporaryDirectory() as root:
        command = [
            *command, "--run_name=run", "--report_to=none", "--no_log_model", "--logging_steps=1",
            f"--stop_after={steps}", f"--checkpointing_steps={steps // 2}",
            "--keep_checkpoints=all",
        ]  # fmt: skip
        straight, killed = (Path(root) / name / "run" for name in ("straight", "killed"))
        middle = killed / "checkpoints" / f"step-{steps // 2:08d}"
        _run([*command, f"--output_dir={straight.parent}"])
        command += [f"--output_dir={killed.parent}"]
        _run(command, kill_at=middle)
        _run([*command, "--resume_from_checkpoint=auto"])
        return compare(straight, killed, steps)


def _run(command, kill_at=None):
    """One run, whose processes are killed when the folder `kill_at` is there."""
    with tempfile.TemporaryFile("w+") as output:  # a pipe that nobody reads would fill up
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise UserError(f"{command[0]} can't be started: {error.strerror}") from None
        try:
            while kill_at is not None and process.poll() is None and not kill_at.exists():
                time.sleep(POLL_SECONDS)
            if kill_at is not None:
                _kill(process)
            process.wait()
        finally:  # after a signal, too
            _kill(process)
        if process.returncode and kill_at is None:
            output.seek(0)
            last = " / ".join(output.read().strip().splitlines()[-3:])
            raise RunStopped(f"a run ended with status {process.returncode}: {last}")


def _kill(process):
    """SIGKILL for a process and for those that it started; a launcher's have their own session."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        every = [launcher, *launcher.children(recursive=True)]
        for one in every:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(every[1:])
    process.wait()


def compare(straight, killed, steps) -> str:
    """The line that says PASS of the folders of two runs; raises RunStopped where they differ."""
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (straight, killed))
    if not ours:
        raise UserError("the command ended without a step: does it start train.py or finetune.py?")
    if ours[-1]["step"] != steps:
        raise UserError(f"{steps} steps were asked for, the run ends after {ours[-1]['step']}")
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


def _leave(number, frame):
    raise SystemExit(128 + number)


def main(words):
    if len(words) < 2 or not words[0].isdecimal() or int(words[0]) < 2:
        raise SystemExit(f"usage: {USAGE}, STEPS at least 2")
    signal.signal(signal.SIGTERM, _leave)  # so that what is begun here is ended, too
    try:
        print(verify_resume(int(words[0]), words[1:]))
    except (UserError, RunStopped) as error:
        raise SystemExit(f"verify_resume: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])

"""Compare a short run with one that is killed half-way and resumed, bit by bit.

    python -m harness.training.verify_resume 20 accelerate launch train.py --config mine.yaml

The number is that of the optimizer steps; any command that starts train.py or finetune.py may
follow. The command is run three times on this machine, in temporary folders: from the start to the
end; again until the checkpoint of the middle is written, when SIGKILL ends all its processes; and
from there to the end. All numbers that were logged after each step and all tensors of the last
checkpoint have to be the same. The exit status is 0 for PASS.
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
    """Run `command` for `steps` steps as described above; returns the line that says PASS.

    steps: at least 2. command: a list of arguments. Raises RunStopped with the first difference,
    and where a run ended with an error.
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
    """Run the command; its processes are killed as soon as the folder `kill_at` exists."""
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
            lines = " / ".join(output.read().strip().splitlines()[-3:])
            raise RunStopped(f"a run ended with status {process.returncode}: {lines}")


def _kill(process):
    """SIGKILL for a process and all that it started, which may be in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        workers = launcher.children(recursive=True)
        for running in (launcher, *workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                running.kill()
        psutil.wait_procs(workers)
    process.wait()


def compare(straight, killed, steps) -> str:
    """The line that says PASS of the folders of two runs; raises RunStopped where they differ."""
    records, resumed_records = (
        read_metrics(folder / "metrics.jsonl") for folder in (straight, killed)
    )
    if not records:
        raise UserError("the command ended without a step: does it start train.py or finetune.py?")
    if records[-1]["step"] != steps:
        raise UserError(f"{steps} steps were asked for, the run ends after {records[-1]['step']}")
    for record, resumed in zip(records, resumed_records, strict=False):
        for name in {**record, **resumed}:
            if json.dumps(record.get(name)) != json.dumps(resumed.get(name)):
                raise RunStopped(
                    f"FAIL: step {record['step']}: {name} is {resumed.get(name)} after a kill and "
                    f"resume, {record.get(name)} without{_hint()}"
                )
    if len(records) != len(resumed_records):
        raise RunStopped(
            f"FAIL: {len(resumed_records)} records after a kill and resume, {len(records)} without"
        )
    (tensors, _), (resumed_tensors, _) = (
        load_checkpoint(checkpoints(folder / "checkpoints")[-1]) for folder in (straight, killed)
    )
    count = 0
    for file in tensors:
        for name, tensor in tensors[file].items():
            count += 1
            resumed = resumed_tensors[file][name]
            if not torch.equal(tensor, resumed):
                distance = (tensor.double() - resumed.double()).abs().max()
                raise RunStopped(
                    f"FAIL: after step {steps}: {file} {name} differs by up to "
                    f"{distance:.3g}{_hint()}"
                )
    return (
        f"PASS: {steps} steps, killed and resumed at {steps // 2}: {len(records)} records and "
        f"{count} tensors are the same, bit by bit"
    )


def _hint():
    return "; try --deterministic" if torch.accelerator.is_available() else ""


def _leave(number, frame):
    raise SystemExit(128 + number)


def main(argv):
    if len(argv) < 2 or not argv[0].isdecimal() or int(argv[0]) < 2:
        raise SystemExit(f"usage: {USAGE}, STEPS at least 2")
    signal.signal(signal.SIGTERM, _leave)  # so that _run ends the command, too
    try:
        print(verify_resume(int(argv[0]), argv[1:]))
    except (UserError, RunStopped) as error:
        raise SystemExit(f"verify_resume: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])

"""A disk that is full or read-only: older checkpoints stay, training goes on where it can."""

import errno
import functools
import os
import subprocess

import pytest

import faulty
import smallruns
from harness.errors import UserError
from harness.training.checkpoint import checkpoints, load_checkpoint

FLAGS = {"batch_size": 16, "gradient_accumulation_steps": 1, "epochs": 1, "logging_steps": 1}


@pytest.fixture
def small_disk(tmp_path):
    """A function of megabytes -> a file system of that size."""
    mounted = []

    def mount(megabytes):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_after(folder, step):
    """Fill the disk before this step, once; only a few kilobytes stay free."""
    import train

    if os.environ.get("LOCAL_RANK", "0") != "0":
        return

    def fill():
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        with open(folder / "ballast", "wb") as file:
            file.write(bytes(max(0, free - 100_000)))

    train.draw_mixing = faulty.Nth(train.draw_mixing, step + 1, fill)


def free_again(folder, full, free):
    import train

    fill_after(folder, full)
    train.draw_mixing = faulty.Nth(
        train.draw_mixing, free + 1, lambda: (folder / "ballast").unlink()
    )


def verified(folder):
    steps = []
    for path in checkpoints(folder / "checkpoints"):
        load_checkpoint(path)
        steps.append(int(path.name[5:]))
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]
    return steps


def test_training_goes_on_and_the_old_checkpoints_verify(small_disk):
    disk = small_disk(40)
    fault = functools.partial(free_again, disk, 5, 9)
    run = faulty.start(disk, fault=fault, checkpointing_steps=2, **FLAGS)
    folder = run.done()
    assert "warning: no checkpoint of step 6" in run.output()
    assert "training goes on, older checkpoints are intact" in run.output()
    assert verified(folder) == [10, 12]


def test_a_final_save_that_fails_is_an_error(small_disk):
    disk = small_disk(40)
    fault = functools.partial(fill_after, disk, 5)
    run = faulty.start(disk, fault=fault, checkpointing_steps=2, **FLAGS)
    (status,) = run.wait()
    assert status == 1, run.output()
    assert run.output().rstrip().splitlines()[-1].startswith("train.py: ")
    assert "No space left on device" in run.output()
    assert "Traceback" not in run.output()
    assert verified(run.folder) == [2, 4]


def test_two_processes_both_end(small_disk):
    disk = small_disk(40)
    fault = functools.partial(fill_after, disk, 5)
    run = faulty.start(disk, fault=fault, processes=2, checkpointing_steps=2, **FLAGS)
    assert all(run.wait(60)), run.output()
    assert verified(run.folder) == [2, 4]


def metrics_cannot_be_written():
    """ENOSPC from the first line of metrics.jsonl after step 5, as with no byte left."""
    import builtins

    from harness.training import metrics_file

    def write(path, mode="r", *rest, **options):
        if str(path).endswith("metrics.jsonl") and "a" in mode:
            calls.append(1)
            if len(calls) > 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return builtins.open(path, mode, *rest, **options)

    calls = []
    metrics_file.open = write


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.everyday), 2])
def test_metrics_that_cannot_be_written_end_all_processes_in_one_line(tmp_path, processes):
    fault = metrics_cannot_be_written
    run = faulty.start(tmp_path, fault=fault, processes=processes, checkpointing_steps=2, **FLAGS)
    assert all(run.wait(60)), run.output()
    assert "metrics.jsonl: No space left on device" in run.output()
    assert verified(run.folder)[-1] >= 4


def test_a_read_only_disk_is_refused_at_once(small_disk):
    disk = small_disk(10)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises((UserError, OSError)) as error:
        smallruns.train(disk, **FLAGS)
    assert str(disk) in str(error.value) or error.value.errno == errno.EROFS


def test_a_second_process_is_refused(tmp_path):
    first = faulty.start(tmp_path, **{**FLAGS, "epochs": 30})
    first.wait_for(first.said("tracking"))
    second = faulty.start(tmp_path, resume_from_checkpoint="auto", **{**FLAGS, "epochs": 30})
    assert second.wait() == [2]
    assert "is in use by process" in second.output() and "Traceback" not in second.output()
    first.send(15)
    assert first.wait() == [143]

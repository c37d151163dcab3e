"""Tests run offline, on one thread a process, from any working directory.

Three parts: `make test-quick`, `make test` and `make test-sweeps`. What is marked `sweep` (of
tests/faults: whatever is not marked `everyday`) is left out by pytest itself, and the last line
says so. It runs where it is asked for: `-m sweep`, `-m faults`, or a file or a folder of tests/ on
the command line (`pytest tests/models`).
"""

import os
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Two processes that wait for each other's threads by spinning take 10 times as long on two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors take longer on two
sys.path.insert(0, str(HERE.parent))


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(config, items):
    kept, left = [], []
    for item in items:
        if HERE / "faults" in item.path.parents:
            item.add_marker("faults")
            if not item.get_closest_marker("everyday"):
                item.add_marker("sweep")
        sweep = item.get_closest_marker("sweep")
        if sweep:
            item.add_marker("slow")
        (left if sweep and not asked_for(config, item.path) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def asked_for(config, path):
    """Whether the command line asks for the sweeps of this file."""
    return marks_asked_for(config) or bool(named(config) & {path, *path.parents})


def marks_asked_for(config):
    return bool({"sweep", "faults"} & set(re.findall(r"\w+", config.option.markexpr)))


def named(config):
    """The files and folders inside tests/ that the command line names."""
    start = config.invocation_params.dir
    places = {(start / argument.split("::")[0]).resolve() for argument in config.args}
    return {place for place in places if HERE in place.parents}


def pytest_terminal_summary(terminalreporter, config):
    if not marks_asked_for(config) and not named(config):
        terminalreporter.write_line("left out: tests marked sweep (make test-sweeps runs them)")

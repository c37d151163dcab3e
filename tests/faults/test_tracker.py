"""A tracker without key, host or manners: training starts in time and gives the same weights.

What the tracker itself does then is in tests/test_tracking.py.
"""

import functools
import hashlib
import re
import socket
import threading
import time

import pytest

import faulty
from harness.training.metrics_file import read_metrics

FLAGS = {"epochs": 1, "logging_steps": 1}
KEY = "0" * 40


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    """(weights' sha256, metrics, seconds to the first step) without a tracker."""
    root = tmp_path_factory.mktemp("untracked")
    return outcome(faulty.start(root, fault=clock, **FLAGS))


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Seconds to the first step with W&B offline: its start takes some, whatever the network."""
    root = tmp_path_factory.mktemp("offline")
    return outcome(faulty.start(root, fault=clock, report_to="wandb", **FLAGS))[2]


@pytest.fixture
def silent_host():
    """A server that takes connections and never says a word."""
    held = []
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            try:
                held.append(listener.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    for connection in held:
        connection.close()


def clock():
    """Say how long it took from here to the first step."""
    import train

    begin, real = time.perf_counter(), train.draw_mixing

    def draw_mixing(*args):
        if begin is not None and not said:
            said.append(1)
            print(f"first step after {time.perf_counter() - begin:.2f} s", flush=True)
        return real(*args)

    said = []
    train.draw_mixing = draw_mixing


def outcome(run):
    folder = run.done(120)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    seconds = float(re.search(r"first step after ([\d.]+) s", run.output())[1])
    return weights, read_metrics(folder / "metrics.jsonl"), seconds


def awkward(behave, seconds=0.0):
    """A tracker whose log raises, or takes its time."""
    clock()
    import wandb

    real = wandb.init

    def init(*args, **options):
        run = real(*args, **options)

        def log(*args, **options):
            time.sleep(seconds)
            if behave == "raises":
                raise OSError("tracker out of order")

        run.log = log
        return run

    wandb.init = init


CASES = {
    "no key": (clock, {"WANDB_MODE": "", "WANDB_API_KEY": ""}),
    "black hole": (clock, {"WANDB_MODE": "", "WANDB_API_KEY": KEY}),
    "log raises": (functools.partial(awkward, "raises"), {"WANDB_MODE": "offline"}),
    "log is slow": (functools.partial(awkward, "slow", 0.5), {"WANDB_MODE": "offline"}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_and_starts_in_time(untracked, usual, silent_host, tmp_path, case):
    fault, env = CASES[case]
    env = {"WANDB_BASE_URL": silent_host, "HOME": str(tmp_path), "NETRC": "/dev/null", **env}
    run = faulty.start(tmp_path, fault=fault, env=env, report_to="wandb", **FLAGS)
    weights, metrics, seconds = outcome(run)
    assert (weights, metrics) == untracked[:2]
    assert seconds - usual < 5

"""Trackers show what was logged, and nothing they do stops or holds up training."""

import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker

from harness import tracking
from harness.errors import UserError
from harness.tracking import Tracking, TrackingOptions, answers, flatten, parse_report_to
from harness.training.folder import FolderOptions, check_folder, report_folder

wandb = pytest.importorskip("wandb")

ABOUT = {"job_type": "train", "tags": ["digits", "resnet18", "x" * 70], "run_id": None}
RECIPE = {"lr": 0.1, "steps": 7, "nesterov": True, "stem": None, "decay": {"norm": 0.0}}
RECORDS = [
    {"step": 10, "epoch": 0.5, "train/loss": 2.25, "train/lr": 0.1},
    {"step": 20, "epoch": 1.0, "train/loss": 1.125, "train/lr": 0.05},
    {"step": 20, "epoch": 1, "val/acc": 0.75, "val/loss": 0.5, "test/acc": 0.75},
    {"step": 30, "epoch": 1.5, "train/loss": 0.875, "train/lr": 0.0},
    {"step": 40, "epoch": 2, "val/acc": 0.625, "val/loss": 0.25, "test/acc": 0.625},
]


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No credentials, no user settings, no state of an earlier test."""
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # or it would come back after this, and lead to no one
    for name in [name for name in os.environ if name.startswith("WANDB_") or "proxy" in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/.netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()
    AcceleratorState._reset_state(True)


def start(folder, report_to=("wandb",), **about):
    return Tracking(Accelerator(cpu=True), options(report_to), folder=folder, **ABOUT | about)


def options(report_to):
    return TrackingOptions(",".join(report_to) or "none", "tests", "digits", RECIPE)


def read_wandb(folder):
    """The records of each offline run in `folder`, oldest first, as W&B's own reader has them."""
    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append([json.loads(line) for line in lines.splitlines()])
    return runs


def history(run):
    items = [record["history"]["item"] for record in run if record["type"] == "history"]
    return [{k: v for k, v in item.items() if not k.startswith("_")} for item in items]


@pytest.mark.parametrize(
    "value, names",
    [
        ("wandb", ["wandb"]),
        ("tensorboard, WandB,wandb", ["tensorboard", "wandb"]),
        ("none", []),
    ],
)
def test_parse_report_to(value, names):
    assert parse_report_to(value) == names


@pytest.mark.parametrize(
    "value, said",
    [("wandbb", '"wandb"'), ("tensorbord", '"tensorboard"'), ("", "none"), ("none,wandb", "alone")],
)
def test_parse_report_to_names_the_nearest(value, said):
    with pytest.raises(UserError, match=said):
        parse_report_to(value)


def test_flatten_leaves_plain_values_only():
    config = {"a": 1, "b": {"c": None, "d": {"e": [1, 2]}}, "f": True, "g": 0.5, "h": ABOUT.keys}
    flat = flatten(config)
    assert flat.pop("h").startswith("<built-in")
    assert flat == {"a": 1, "b/c": "none", "b/d/e": "1,2", "f": True, "g": 0.5}


def test_wandb_offline_run_reads_back(tmp_path):
    from PIL import Image

    folder = tmp_path / "runs/x"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 3), "red").save(folder / "picture.png")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    run = start(folder)
    assert run.line.startswith("W&B offline (WANDB_MODE): `wandb sync runs/x/wandb/offline-run-")
    assert (tmp_path / run.line.split("wandb sync ")[1].rstrip("`")).is_dir()
    for record in RECORDS:
        run.log(record, record["step"])
    run.log_image("train_batch", folder / "picture.png", 40)
    run.log_model(folder / "model.safetensors", {"test/acc": 0.625})
    run.summary({"seconds": 1.5, "versions": {"torch": "2"}})
    run.finish(exit_code=3)
    run.finish()

    (records,) = read_wandb(folder)
    seen = history(records)
    picture = seen.pop()
    assert seen == RECORDS
    assert picture["step"] == 40
    assert (picture["train_batch.width"], picture["train_batch.height"]) == (4, 3)
    about = next(record["run"] for record in records if record["type"] == "run")
    assert about["run_id"] == run.run_id
    shown = [about[key] for key in ("project", "display_name", "run_group", "job_type")]
    assert shown == ["tests", "x", "digits", "train"]
    assert about["tags"] == ["digits", "resnet18", "x" * 64]
    config = {}
    for record in records:
        config |= record.get("config", {}).get("update", {})
    config.pop("_wandb", None)
    assert config == flatten(RECIPE)
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    axes = {m.get("name") or m["glob_name"]: m.get("step_metric") for m in metrics}
    assert axes["train/*"] == "step"
    assert axes["val/*"] == axes["test/*"] == axes["epoch/*"] == axes["val/acc_ema"] == "epoch"
    summary = {}
    for record in records:
        summary |= record.get("summary", {}).get("update", {})
    assert summary["val/acc"] == {"max": 0.75} and summary["val/loss"] == {"min": 0.25}
    assert summary["test/acc"] == 0.625  # the last, not the best: test is never chosen on
    assert summary["seconds"] == 1.5 and summary["versions/torch"] == "2"
    (artifact,) = (record["artifact"] for record in records if record["type"] == "artifact")
    assert artifact["type"] == "model" and "latest" in artifact["aliases"]
    assert artifact["name"] == f"model-{run.run_id}"
    assert records[-1]["exit"]["exit_code"] == 3


def test_wandb_resumes_the_run_and_drops_no_point(tmp_path):
    first = start(tmp_path)
    for record in RECORDS:
        first.log(record, record["step"])
    first.finish(exit_code=143)
    AcceleratorState._reset_state(True)
    time.sleep(1.1)  # W&B names folders by the second
    second = start(tmp_path, run_id=first.run_id)
    for record in RECORDS[3:]:  # the checkpoint was at step 20
        second.log(record, record["step"])
    second.finish()

    runs = read_wandb(tmp_path)
    assert [history(run) for run in runs] == [RECORDS, RECORDS[3:]]
    for run in runs:
        about = next(record["run"] for record in run if record["type"] == "run")
        assert about["run_id"] == first.run_id and about["resume"]


def test_not_a_number_reaches_wandb_and_tensorboard(tmp_path):
    run = start(tmp_path, ["wandb", "tensorboard"])
    run.log({"step": 1, "epoch": 0.1, "train/loss": math.nan, "train/lr": None}, 1)
    run.finish()
    assert history(read_wandb(tmp_path)[0])[0]["train/loss"] == "NaN"
    assert math.isnan(read_tensorboard(tmp_path)["train/loss"][0][1])


def read_tensorboard(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = {key: events.Scalars(key) for key in events.Tags()["scalars"]}
    return {key: [(point.step, point.value) for point in points] for key, points in scalars.items()}


def test_tensorboard_reads_back(tmp_path):
    from PIL import Image

    pytest.importorskip("tensorboard")
    Image.new("RGB", (4, 3), "red").save(tmp_path / "picture.png")
    run = start(tmp_path, ["tensorboard"])
    assert run.line == "TensorBoard: `tensorboard --logdir tensorboard`"
    for record in RECORDS:
        run.log(record, record["step"])
    run.log_image("train_batch", tmp_path / "picture.png", 40)
    run.summary({"seconds": 1.5})
    run.log_model(tmp_path / "picture.png", {})
    run.finish()
    points = read_tensorboard(tmp_path)
    assert points.keys() == {key for record in RECORDS for key in record} - {"step"}
    for key in points.keys() - {"epoch"}:
        assert points[key] == [(r["step"], pytest.approx(r[key])) for r in RECORDS if key in r]


def test_nothing_asked_for_and_other_processes(tmp_path, monkeypatch):
    run = start(tmp_path, [])
    assert "none" in run.line
    run.log({"a": 1}, 1)
    run.finish()
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "is_main_process", False)
    run = Tracking(accelerator, options(["wandb", "tensorboard"]), folder=tmp_path, **ABOUT)
    run.log({"a": 1}, 1)
    run.finish()
    assert run.line == "" and not list(tmp_path.iterdir()) and not accelerator.trackers


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    run = start(tmp_path)
    assert "pip install wandb" in run.line
    run.log({"a": 1}, 1)
    run.finish()
    options = FolderOptions("runs", None, {}, report_to="tensorboard")
    for folder_of in (check_folder, report_folder):
        with pytest.raises(UserError, match="pip install tensorboard"):  # before any work
            folder_of(options, "a", "train.py")


def test_a_start_that_fails_spares_the_other_tracker(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")

    def init(*args, **kwargs):
        raise wandb.errors.CommError("no such entity\nmore")

    monkeypatch.setattr(wandb, "init", init)
    run = start(tmp_path, ["wandb", "tensorboard"])
    assert "W&B did not start (CommError: no such entity): not tracked there · Tens" in run.line
    run.log({"step": 1, "train/loss": 0.5}, 1)
    run.finish()
    assert read_tensorboard(tmp_path)["train/loss"] == [(1, 0.5)]


# Offline is decided before the first wandb.init


def online(monkeypatch, url="http://127.0.0.1:9", key="0123456789" * 4):
    """W&B with a key and a server of its own: nothing listens on port 9."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", url)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)


def timed_line(folder):
    begin = time.perf_counter()
    run = start(folder)
    seconds = time.perf_counter() - begin
    run.log(RECORDS[0], 10)
    run.finish()
    assert history(read_wandb(folder)[0]) == RECORDS[:1]
    return seconds, run.line


def test_no_credentials_is_offline(tmp_path, monkeypatch):
    online(monkeypatch, key=None)
    for mode in (None, "online"):
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        assert tracking.decide_wandb_mode() == ("offline", "no credentials")
        wandb.teardown()


@pytest.mark.parametrize("mode", [None, "online"])
def test_closed_port_is_offline_at_once(tmp_path, monkeypatch, mode):
    online(monkeypatch)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    seconds, line = timed_line(tmp_path)
    assert line.startswith("W&B offline (no answer from 127.0.0.1:9): `wandb sync wandb/offline-")
    assert seconds < 5


@pytest.mark.slow
def test_silent_server_is_offline_in_time(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # connects, and never answers
        online(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        seconds, line = timed_line(tmp_path)
    assert "no answer from 127.0.0.1" in line
    assert seconds < 5


def test_hanging_name_lookup_is_offline_in_time(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: release.wait(60) and [])
    begin = time.perf_counter()
    assert not answers("https://wandb.example", seconds=0.5)
    assert time.perf_counter() - begin < 1.5
    release.set()


@pytest.mark.parametrize(
    "status, body, expected",
    [
        ("200 OK", b'{"data": {"__typename": "Query"}}', True),
        ("401 Unauthorized", b"", True),
        ("200 OK", b"<html>please log in</html>", False),
        ("404 Not Found", b"", False),
        ("503 Service Unavailable", b"{}", False),
    ],
)
def test_what_counts_as_an_answer(status, body, expected):
    def serve(server):
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + body)
            connection.recv(65536)  # the rest of the question, or its end

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        assert answers(f"http://127.0.0.1:{server.getsockname()[1]}") is expected


def test_credentials_in_netrc_and_a_server_that_answers_is_online(tmp_path, monkeypatch):
    online(monkeypatch, key=None)
    (tmp_path / "home").mkdir()
    text = f"machine 127.0.0.1:9 login user password {'0123456789' * 4}\n"
    (tmp_path / "home/.netrc").write_text(text)
    (tmp_path / "home/.netrc").chmod(0o600)
    assert tracking.decide_wandb_mode() == ("offline", "no answer from 127.0.0.1:9")
    monkeypatch.setattr(tracking, "answers", lambda url: True)
    assert tracking.decide_wandb_mode() == ("online", "")


def test_disabled_by_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = start(tmp_path)
    run.log(RECORDS[0], 10)
    run.finish()
    assert run.line == "W&B disabled (WANDB_MODE)" and not list(tmp_path.glob("wandb/*run-*"))


# A broken or slow tracker


class Awkward(GeneralTracker):
    name = "awkward"
    requires_logging_directory = False
    main_process_only = True
    tracker = None

    def __init__(self, behave):
        super().__init__()
        self.behave = behave

    def log(self, values, step=None, **kwargs):
        self.behave()

    def finish(self):
        self.behave()


def with_awkward(folder, behave):
    run = start(folder)
    tracker = Awkward(behave)
    run._accelerator.trackers.append(tracker)
    run._trackers.insert(0, tracker)
    return run


def test_a_tracker_that_raises_is_warned_about_once(tmp_path, caplog):
    def fail():
        raise OSError("disk full")

    run = with_awkward(tmp_path, fail)
    with caplog.at_level(logging.WARNING, logger="harness.tracking"):
        for record in RECORDS:
            run.log(record, record["step"])
        run.finish()
    said = [record.message for record in caplog.records if record.name == "harness.tracking"]
    assert said == [
        "awkward: OSError: disk full; training goes on, metrics.jsonl is complete, "
        "more of this is not shown"
    ]
    assert history(read_wandb(tmp_path)[0]) == RECORDS
    assert run._accelerator.trackers == []


def test_a_tracker_that_hangs_holds_up_the_end_only_so_long(tmp_path, caplog):
    release = threading.Event()
    run = with_awkward(tmp_path, release.wait)
    run._patience = 0.5
    begin = time.perf_counter()
    for step in range(1000):
        run.log({"step": step, "train/loss": 1.0}, step)
    assert time.perf_counter() - begin < 2  # nothing waited
    with caplog.at_level(logging.WARNING, logger="harness.tracking"):
        run.finish()
    assert time.perf_counter() - begin < 5
    assert "gave up waiting" in caplog.text
    release.set()
    run._thread.join(20)

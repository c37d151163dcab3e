"""Killed anywhere: what was published stays, what was half written is never chosen."""

import contextlib
import functools
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

import faulty
import smallruns
from harness.training.checkpoint import checkpoints, load_checkpoint, newest_valid, save_checkpoint
from harness.training.metrics_file import read_metrics

SHORT = {"batch_size": 16, "gradient_accumulation_steps": 1, "logging_steps": 1}  # 12 an epoch


def say_nothing(line):
    raise AssertionError(line)


def newest(folder):
    """The step of the newest checkpoint; none of the published ones may be damaged."""
    found = newest_valid(folder / "checkpoints", say_nothing)
    return found[2]["step"] if found else 0


# --- kill -9 at every point of a save ---

TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"}


class FileSystem:
    """Calls `act(n)` before the n-th call that touches what is under `root`, or syncs a file.

    Counted from where the `which`-th save makes the folder that it writes into.
    """

    def __init__(self, root, act, which=1):
        self.root, self.act, self.which = str(root), act, which
        self.saves = self.calls = 0
        sys.addaudithook(self.audit)
        real = os.fsync
        os.fsync = lambda handle: (self.touched(), real(handle))[1]

    def audit(self, event, args):
        if event in TOUCHES and args and str(args[0]).startswith(self.root):
            self.saves += event == "os.mkdir" and ".writing-step" in str(args[0])
            self.touched()

    def touched(self):
        if self.saves >= self.which:
            self.calls += 1
            self.act(self.calls)


def tensors(step):
    return {"model": {"w": torch.full((3, 4), float(step))}, "ema": {"w": torch.ones(2) * step}}


def save(root, step, keep=2):
    return save_checkpoint(root, step, tensors(step), {"step": step}, keep)


def save_until(root, step, n):
    """A save of this step that is killed at its n-th touch, or ends with status 7."""

    FileSystem(root, functools.partial(kill_at, n))
    save(root, step)
    os._exit(7)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, id="next"),
        pytest.param(2, id="same step again", marks=[pytest.mark.everyday, pytest.mark.slow]),
    ],
)
def test_killed_at_every_point_of_a_save(tmp_path, step):
    n, points, published = 0, 0, 0
    while True:
        n += 1
        root = tmp_path / str(n)
        for before in (1, 2):
            save(root, before)
        process = faulty.context().Process(target=save_until, args=(root, step, n), daemon=True)
        process.start()
        process.join(30)
        assert process.exitcode in (-signal.SIGKILL, 7)
        # Nothing damaged is ever under a published name, and at most this save is lost
        kept = checkpoints(root)
        assert kept, f"point {n}: no checkpoint left"
        for folder in kept[-2:]:  # what is being pruned may be half gone
            found, _ = load_checkpoint(folder)
            assert torch.equal(found["model"]["w"], tensors(int(folder.name[5:]))["model"]["w"])
        _, _, state = newest_valid(root, say_nothing)
        assert state["step"] >= min(2, step - 1)
        published += state["step"] == 3
        save(root, 4)
        names = sorted(p.name for p in root.iterdir())
        assert names[-1] == "step-00000004" and len(names) == 2, f"point {n} left {names}"
        if process.exitcode == 7:
            break
        points += 1
    assert points > 15
    assert step == 2 or 1 < published < points


def kill_in_save(folder, which, n):
    """Kill the process at the n-th touch of its save number `which`."""
    act = functools.partial(kill_at, n)
    FileSystem(folder / "checkpoints", act, which)


def kill_at(n, calls):
    if calls == n:
        faulty.kill_here()


@pytest.mark.parametrize("n", [4, 13, 17, 21])
def test_a_run_killed_in_a_save_ends_as_if_nothing_had_been(plain_run, tmp_path, n):
    fault = functools.partial(kill_in_save, tmp_path / "run", 3, n)
    killed = faulty.start(tmp_path, fault=fault, checkpointing_steps=2, epochs=1, **SHORT)
    assert killed.wait() == [-signal.SIGKILL], killed.output()
    assert newest(tmp_path / "run") in (4, 6)
    folder = faulty.start(
        tmp_path, checkpointing_steps=2, epochs=1, resume_from_checkpoint="auto", **SHORT
    ).done()
    assert smallruns.digest(folder) == smallruns.digest(plain_run)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """12 steps that nobody disturbed."""
    root = tmp_path_factory.mktemp("plain")
    return faulty.start(root, checkpointing_steps=2, epochs=1, **SHORT).done()


# --- kill -9 at random moments ---

MANY = {**SHORT, "epochs": 20, "checkpointing_steps": 4, "eval_epochs": 4}


def test_killed_30_times_at_random_moments(tmp_path):
    whole = faulty.start(tmp_path / "whole", **MANY)
    seed = int(os.environ.get("FAULT_SEED", time.time()))
    rng = random.Random(seed)
    folder, last, kills = tmp_path / "parts" / "run", 0, 0
    while kills < 30:
        run = faulty.start(tmp_path / "parts", resume_from_checkpoint="auto", **MANY)
        time.sleep(rng.uniform(0.05, 3.0))
        with contextlib.suppress(ProcessLookupError):  # it was at its end
            run.send(signal.SIGKILL)
        (status,) = run.wait()
        if status == 0:
            shutil.rmtree(tmp_path / "parts")
            last = 0
            continue
        assert status == -signal.SIGKILL, run.output()
        kills += 1
        assert "damaged" not in run.output()
        now = newest(folder) if folder.exists() else 0
        assert now >= last, f"FAULT_SEED={seed}: from step {last} back to {now}"
        reached = max((r["step"] for r in read_metrics(folder / "metrics.jsonl")), default=0)
        # One interval, and the one whose checkpoint was being written
        assert reached - now <= 8, f"FAULT_SEED={seed}: at step {reached}, checkpoint {now}"
        last = now
    folder = faulty.start(tmp_path / "parts", resume_from_checkpoint="auto", **MANY).done()
    assert smallruns.digest(folder) == smallruns.digest(whole.done()), f"FAULT_SEED={seed}"


# --- what is kept ---


def list_at_every_touch(root, log):
    def act(calls):
        with open(log, "a") as file:
            file.write(json.dumps(sorted(p for p in os.listdir(root) if p[:5] == "step-")) + "\n")

    root.mkdir(parents=True, exist_ok=True)
    hook = FileSystem(root, lambda calls: None)
    busy = []

    def once(calls):  # listing the folder is a touch too
        if not busy:
            busy.append(1)
            act(calls)
            busy.clear()

    hook.act = once


def test_the_newest_two_at_every_moment_over_three_restarts(tmp_path):
    root, log = tmp_path / "run" / "checkpoints", tmp_path / "listings.jsonl"
    flags = {**SHORT, "epochs": 1, "checkpointing_steps": 1, "max_checkpoints": 2}
    for stop in (3, 6, 9, None):
        more = {"resume_from_checkpoint": "auto"} if stop != 3 else {}
        if stop == 3:  # the folder must not be there before the run
            faulty.start(tmp_path, stop_after=1, **flags).done()
            more = {"resume_from_checkpoint": "auto"}
        fault = functools.partial(list_at_every_touch, root, log)
        faulty.start(tmp_path, fault=fault, stop_after=stop, **flags, **more).done()
    listings = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(listings) > 100
    highest = 1
    for names in listings:
        steps = [int(name[5:]) for name in names]
        highest = max([highest, *steps])
        assert steps[-2:] == ([highest - 1, highest] if highest > 1 else [1]), names
        assert len(steps) <= 3
    assert highest == 12 and [p.name for p in checkpoints(root)] == [
        "step-00000011", "step-00000012"
    ]  # fmt: skip


# --- signals ---

PLACES = {  # what is called there: module, name, at which call of this process
    "before the first step": ("train", "train_batches", 1),
    "in a step": ("train", "draw_mixing", 5),
    "in an evaluation": ("harness.training.scoring", "evaluate", 1),
}


def signal_in(place, number, ranks, times=1):
    if int(os.environ.get("RANK", 0)) not in ranks:
        return
    module, name, n = PLACES[place]
    owner = importlib.import_module(module)
    send = functools.partial(signal_self, number, times)
    setattr(owner, name, faulty.Nth(getattr(owner, name), n, send))


def signal_self(number, times=1):
    for _ in range(times):
        os.kill(os.getpid(), number)


def signal_in_save(root, number):
    FileSystem(root, lambda calls: signal_self(number) if calls == 6 else None)


def stopped_and_resumed(tmp_path, fault, status, processes, whole):
    flags = {**SHORT, "epochs": 2, "checkpointing_steps": 100}
    stopped = faulty.start(tmp_path, fault=fault, processes=processes, **flags)
    begin = time.monotonic()
    assert stopped.wait(60) == [status] * processes, stopped.output()
    assert time.monotonic() - begin < 30
    assert "stopped at step" in stopped.output()
    assert 1 <= newest(stopped.folder) < 24
    assert not list((stopped.folder / "checkpoints").glob(".*"))
    resumed = faulty.start(tmp_path, processes=processes, resume_from_checkpoint="auto", **flags)
    assert smallruns.digest(resumed.done()) == smallruns.digest(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{number of processes: the run that got no signal}."""
    flags = {**SHORT, "epochs": 2, "checkpointing_steps": 100}
    roots = {n: tmp_path_factory.mktemp(f"whole{n}") for n in (1, 2)}
    return {n: faulty.start(root, processes=n, **flags).done() for n, root in roots.items()}


@pytest.mark.parametrize("number", smallruns.SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_to_one_process(whole, tmp_path, place, number):
    fault = functools.partial(signal_in, place, number, (0,))
    stopped_and_resumed(tmp_path, fault, smallruns.SIGNALS[number], 1, whole[1])


@pytest.mark.parametrize("number", smallruns.SIGNALS, ids=lambda n: n.name)
def test_a_signal_in_a_save(whole, tmp_path, number):
    flags = {**SHORT, "epochs": 2, "checkpointing_steps": 3}
    fault = functools.partial(signal_in_save, tmp_path / "run" / "checkpoints", number)
    stopped = faulty.start(tmp_path, fault=fault, **flags)
    assert stopped.wait(60) == [smallruns.SIGNALS[number]], stopped.output()
    assert newest(stopped.folder) in (3, 4, 5)
    flags["checkpointing_steps"] = 100
    folder = faulty.start(tmp_path, resume_from_checkpoint="auto", **flags).done()
    assert smallruns.digest(folder) == smallruns.digest(whole[1])


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_to_one_of_two_processes(whole, tmp_path, place):
    fault = functools.partial(signal_in, place, signal.SIGTERM, (1,))
    stopped_and_resumed(tmp_path, fault, 143, 2, whole[2])


def test_a_signal_to_both_processes_twice(whole, tmp_path):
    """As a terminal's Ctrl-C, and a launcher that passes it on again."""
    fault = functools.partial(signal_in, "in a step", signal.SIGINT, (0, 1), times=2)
    stopped_and_resumed(tmp_path, fault, 130, 2, whole[2])


def at_call(module, name, n, number):
    owner = importlib.import_module(module)
    setattr(owner, name, faulty.Nth(getattr(owner, name), n, lambda: signal_self(number)))


def killed_when_written(root, step):
    from harness.training import scoring

    def wait():
        while not (root / f"step-{step:08d}").exists():
            time.sleep(0.01)
        signal_self(signal.SIGKILL)

    scoring.evaluate = faulty.Nth(scoring.evaluate, 2, wait)


@pytest.mark.slow
@pytest.mark.everyday
def test_an_epochs_checkpoint_is_there_before_its_evaluation(whole, tmp_path):
    """Killed in the second part of the evaluation; what it told is told again."""
    fault = functools.partial(killed_when_written, tmp_path / "run" / "checkpoints", 12)
    flags = {**SHORT, "epochs": 2}
    faulty.start(tmp_path, fault=fault, **flags).wait(60)
    assert newest(tmp_path / "run") == 12
    assert not any("test/acc" in r for r in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    folder = faulty.start(tmp_path, resume_from_checkpoint="auto", **flags).done()
    assert smallruns.digest(folder) == smallruns.digest(whole[1])


LONG_WORK = {  # script, flags, what is called there: module, name, at which call; the step
    "the test at the end": ("train", {"val_fraction": 0.25, "batch_size": 24}, "train",
                            "evaluate", 5, 16),
    "features": ("finetune", smallruns.FINETUNE, "harness.training.features", "run_with_input",
                 3, 0),
}  # fmt: skip


@pytest.mark.parametrize("work", LONG_WORK)
def test_long_work_is_left_off_after_a_signal_and_done_again(tmp_path, work):
    script, special, *place, step = LONG_WORK[work]
    flags = {"logging_steps": 1, "epochs": 2, "script": script, **special}
    whole = faulty.start(tmp_path / "whole", **flags).done()
    fault = functools.partial(at_call, *place, signal.SIGTERM)
    stopped = faulty.start(tmp_path, fault=fault, **flags)
    assert stopped.wait(60) == [143], stopped.output()
    assert f"stopped at step {step} of" in stopped.output()
    assert newest(stopped.folder) == step
    assert not (stopped.folder / "summary.json").exists()
    folder = faulty.start(tmp_path, resume_from_checkpoint="auto", **flags).done()
    assert smallruns.digest(folder) == smallruns.digest(whole)


def test_a_signal_before_there_is_a_run_leaves_nothing(whole, tmp_path):
    stopped = faulty.start(tmp_path, fault=terminate_at_plan, **SHORT, epochs=2)
    assert stopped.wait(30)[0] in (-signal.SIGTERM, 143)
    assert not stopped.folder.exists()


def terminate_at_plan():
    from harness.training import plan

    plan.load = faulty.Nth(plan.load, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))


# --- one process of two dies or raises ---


def at_step(step, rank, act):
    import train

    if int(os.environ.get("RANK", 0)) == rank:
        train.draw_mixing = faulty.Nth(train.draw_mixing, step + 1, act)


def raise_in(module, name, rank):
    def fail():
        raise RuntimeError("out of luck")

    if int(os.environ.get("RANK", 0)) == rank:
        owner = importlib.import_module(module)
        setattr(owner, name, faulty.Nth(getattr(owner, name), 1, fail))


FAULTS = {
    "killed in a step": functools.partial(at_step, 5, 1, faulty.kill_here),
    "the main one killed in a step": functools.partial(at_step, 5, 0, faulty.kill_here),
    "raises in an evaluation": functools.partial(
        raise_in, "harness.training.scoring", "evaluate", 1
    ),
    "the main one raises in an evaluation": functools.partial(
        raise_in, "harness.training.scoring", "evaluate", 0
    ),
    "the main one raises in a save": functools.partial(
        raise_in, "harness.training.checkpoint", "write_synced", 0
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(w, marks=pytest.mark.everyday if w == "killed in a step" else ())
        for w in FAULTS
    ],
)
def test_the_other_process_ends_too(tmp_path, what):
    """No launcher here that would kill it."""
    begin = time.monotonic()
    flags = {**SHORT, "epochs": 2, "checkpointing_steps": 100 if "evaluation" in what else 3}
    run = faulty.start(tmp_path, fault=FAULTS[what], processes=2, **flags)
    statuses = run.wait(60)
    assert time.monotonic() - begin < 40
    assert all(statuses), f"{statuses}\n{run.output()}"
    root = run.folder / "checkpoints"
    assert [p.name for p in root.glob("*") if p.name[0] != "."] in ([], ["step-00000003"])
    newest(run.folder)  # what there is verifies


# --- under torchrun, as a cluster would ---


def torchrun(tmp_path, script, *words, **flags):
    """Start a script with a fault in it on two processes; returns (status, output, children)."""
    (tmp_path / "faulted.py").write_text(script)
    env = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(smallruns.ROOT)}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
        *words, str(tmp_path / "faulted.py"),
        *smallruns.words({**smallruns.SMALL, "output_dir": tmp_path, **flags}),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env={**os.environ, **env}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, _ = process.communicate(timeout=180)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "faulted.py") in
            (p.info["cmdline"] or ()) and p.status() != psutil.STATUS_ZOMBIE]  # fmt: skip
    return process.returncode, output, left


def signals_once(number, victim):
    """train.py, in which process 1 sends a signal in its sixth step, unless it has before."""
    return f"""
import os, signal, time, train
from harness.launch import script
real, calls, marker = train.draw_mixing, [], os.environ["MARKER"]
def draw_mixing(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 6 and not os.path.exists(marker):
        open(marker, "w").write(repr(time.time()))
        os.kill(os.{victim}(), signal.{number})
    return real(*args)
train.draw_mixing = draw_mixing
if __name__ == "__main__":
    with script("faulted.py"):
        train.main(train.read_flags())
"""


DIES_ONCE = signals_once("SIGKILL", "getpid")


ONCE = {**SHORT, "epochs": 2, "checkpointing_steps": 3, "resume_from_checkpoint": "auto"}


def test_torchrun_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "died"))
    status, output, left = torchrun(tmp_path, DIES_ONCE, "--standalone", **ONCE)
    assert time.time() - float((tmp_path / "died").read_text()) < 30
    assert status != 0 and not left, output
    assert newest(tmp_path / "run") == 3


@pytest.mark.parametrize("rendezvous", ["--standalone", "--master_port"])
def test_torchrun_restarts_to_the_same_end(whole, tmp_path, monkeypatch, rendezvous):
    monkeypatch.setenv("MARKER", str(tmp_path / "died"))
    words = [rendezvous, *([str(faulty.free_port())] if rendezvous == "--master_port" else [])]
    status, output, left = torchrun(tmp_path, DIES_ONCE, *words, "--max-restarts", "1", **ONCE)
    assert status == 0 and not left, output
    assert (tmp_path / "died").exists()
    assert smallruns.digest(tmp_path / "run") == smallruns.digest(whole[2])


def test_a_signal_to_torchrun_stops_both_with_a_checkpoint(whole, tmp_path, monkeypatch):
    """As Slurm does before a job's time is over."""
    monkeypatch.setenv("MARKER", str(tmp_path / "sent"))
    flags = {**SHORT, "epochs": 2, "checkpointing_steps": 100}
    status, output, left = torchrun(
        tmp_path, signals_once("SIGTERM", "getppid"), "--standalone", **flags
    )
    assert status != 0 and not left, output
    assert "stopped at step" in output and 5 <= newest(tmp_path / "run") < 24, output
    resumed = faulty.start(tmp_path, processes=2, resume_from_checkpoint="auto", **flags)
    assert smallruns.digest(resumed.done()) == smallruns.digest(whole[2])

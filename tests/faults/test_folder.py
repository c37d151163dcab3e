"""The folder of a run: never taken for empty, never cleared of what is not the run's."""

import functools
import json
import os
import shutil
import signal

import pytest
from faults.test_kill import kill_at

import faulty
import smallruns
from harness.errors import UserError
from harness.models.trained import read_trained
from harness.models.weights import find_weights
from harness.training.folder import FILES
from harness.training.metrics_file import MetricsFile, read_metrics

FLAGS = {"epochs": 1, "logging_steps": 1, "checkpointing_steps": 2, "max_checkpoints": 9}
AUTO = {"resume_from_checkpoint": "auto"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped after step 3, with checkpoints of steps 2 and 3; copied by those who use it."""
    folder, _ = smallruns.train(
        tmp_path_factory.mktemp("stopped"), stop_after=3, val_fraction=0.25, **FLAGS
    )
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run", symlinks=True)


def train(run, **flags):
    return smallruns.train(run.parent, val_fraction=0.25, **FLAGS | flags)


# -- 1: where the checkpoints are gone -----------------------------------------------------------

GONE = {
    "a link to a disk that is not there": lambda run: (
        (run / "checkpoints").rename(run.parent / "scratch"),
        (run / "checkpoints").symlink_to("/nowhere/checkpoints"),
    ),
    "a file": lambda run: (
        (run / "checkpoints").rename(run.parent / "scratch"), (run / "checkpoints").write_text("x"),
    ),
    "moved": lambda run: (run / "checkpoints").rename(run.parent / "scratch"),
    "moved, and its mark": lambda run: (
        (run / "checkpoints").rename(run.parent / "scratch"), (run / ".run.json").unlink(),
        (run / "model.safetensors").write_bytes(b"the best so far"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", GONE)
def test_without_its_checkpoints_a_run_does_not_start_anew(run, how):
    GONE[how](run)
    before = sorted((p.name, p.stat().st_size) for p in run.iterdir() if p.is_file())
    words = "not there|is a file|had a checkpoint of step 2|model.safetensors, but no checkpoint"
    with pytest.raises(UserError, match=f"({words}).*: bring .* back, .* --overwrite"):
        train(run, **AUTO)
    assert sorted((p.name, p.stat().st_size) for p in run.iterdir() if p.is_file()) == before
    assert train(run, overwrite=True)[1] == 0


@pytest.mark.parametrize("again", [{}, AUTO])
def test_killed_before_its_first_checkpoint_a_run_begins_again(tmp_path, again):
    flags = FLAGS | {"checkpointing_steps": 100, **AUTO}
    started = faulty.start(tmp_path, fault=functools.partial(kill_in_step, 4), **flags)
    assert started.wait() == [-signal.SIGKILL]
    records = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    if not again:
        with pytest.raises(UserError, match="holds a run already"):
            smallruns.train(tmp_path, **FLAGS)
        return
    again = faulty.start(tmp_path, **flags)
    folder = again.done()
    assert "starting from step 0" in again.output()
    assert "of a run that had no checkpoint yet are in metrics.before-1.jsonl" in again.output()
    assert (folder / "metrics.before-1.jsonl").read_bytes() == records


def kill_in_step(step):
    import train as script

    script.draw_mixing = faulty.Nth(script.draw_mixing, step, faulty.kill_here)


@pytest.fixture
def at_once():
    """Within, what takes longer than 30 seconds is interrupted: a pipe would be waited for."""

    def interrupt(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_file_in_the_place_of_one_is_named(run, name, make):
    (run / name).unlink(missing_ok=True)
    make(run / name)
    for flags in (AUTO, {"overwrite": True}):
        with pytest.raises(UserError, match=f"^{run / name} is not a file: move it away$"):
            train(run, **flags)
    assert (run / "checkpoints").is_dir()


@pytest.mark.usefixtures("at_once")
def test_pipes_in_a_folder_of_weights_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        for read in (
            lambda: find_weights(str(tmp_path), "test_resnet"),
            lambda: read_trained(tmp_path),
        ):
            with pytest.raises(UserError, match=f"^{tmp_path / name} is not a file"):
                read()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl is not a file"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("flags", [{}, AUTO, {"overwrite": True}])
@pytest.mark.parametrize("link", ["run", "."])
def test_a_dangling_link_in_the_place_of_the_folder_is_named(tmp_path, flags, link):
    (tmp_path / "runs").symlink_to("/nowhere/runs") if link == "." else (
        (tmp_path / "runs").mkdir(), (tmp_path / "runs/run").symlink_to("/nowhere/runs")
    )  # fmt: skip
    with pytest.raises(UserError, match="is a dangling link: /nowhere/runs is not there"):
        smallruns.train(tmp_path / "runs", **FLAGS | flags)


# -- 2: killed while a folder is claimed or cleared ----------------------------------------------


def claim_until(folder, flags, n):
    """Claim the folder and be killed at the n-th touch of it, or end with status 7."""
    from faults.test_kill import FileSystem

    import train as script
    from harness.cli.flags import pick
    from harness.training.folder import FolderOptions, check_folder, claim_folder

    args = script.read_flags(smallruns.words(flags))
    options = pick(FolderOptions, args)
    folder = check_folder(options, "digits", "train.py")
    FileSystem(folder, functools.partial(kill_at, n), which=0)
    claim_folder(folder, options.recipe, options.overwrite, None, "train.py", say=lambda line: None)
    os._exit(7)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_point_of_claiming_and_clearing(stopped, tmp_path, overwrite):
    n = 0
    while True:
        n += 1
        root = tmp_path / str(n)
        if overwrite:
            shutil.copytree(stopped, root / "run")
            (root / "run" / "model.safetensors").write_bytes(b"the best")
            (root / "run" / "predictions").mkdir()
        flags = {**smallruns.SMALL, "output_dir": root}
        flags |= {"overwrite": True} if overwrite else AUTO
        process = faulty.context().Process(
            target=claim_until, args=(root / "run", flags, n), daemon=True
        )
        process.start()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 7)
        again = faulty.context().Process(
            target=claim_until, args=(root / "run", flags, 10**9), daemon=True
        )
        if process.exitcode == 7 and not overwrite:
            break
        again.start()
        again.join(60)
        assert again.exitcode == 7, f"point {n}: the same command does not go on"
        names = {p.name for p in (root / "run").iterdir()}
        assert names <= {".lock", ".run.json", "metrics.jsonl", "config.yaml", "checkpoints"}, n
        assert not any((root / "run").glob("checkpoints/*"))
        if process.exitcode == 7:
            break
    assert n > (15 if overwrite else 6)


def test_a_checkpoints_folder_on_another_disk_is_cleared_and_kept(run, tmp_path):
    (run / "checkpoints").rename(tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    folder, status = train(run, overwrite=True)
    assert status == 0 and (folder / "checkpoints").is_symlink()
    assert len(list((tmp_path / "scratch").iterdir())) > 1


# -- 3: what others wrote ------------------------------------------------------------------------


def test_a_folder_of_another_program_is_not_a_run(tmp_path):
    folder = tmp_path / "run"
    for name in ("predictions", "wandb", "checkpoints"):
        (folder / name).mkdir(parents=True)
        (folder / name / "last.ckpt").write_text("theirs")
    (folder / "config.yaml").write_text("model: {name: net}\nseed: 1\noutput_dir: x\n")
    (folder / "model.safetensors").write_text("theirs")
    for flags in ({}, {"overwrite": True}, AUTO, AUTO | {"overwrite": True}):
        with pytest.raises(UserError, match=r"holds files that train.py did not write"):
            smallruns.train(tmp_path, **FLAGS | flags)
    assert len(list(folder.rglob("last.ckpt"))) == 3


def test_a_foreign_file_among_the_checkpoints_is_named_and_kept(run):
    (run / "checkpoints" / "last.ckpt").write_text("theirs")
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=r"holds last.ckpt, which no run wrote"):
        train(run, overwrite=True)
    assert set(before) <= set(run.rglob("*"))
    (run / "checkpoints" / "last.ckpt").unlink()
    (run / "notes.txt").write_text("mine")
    assert train(run, overwrite=True)[1] == 0  # the same command goes on
    assert (run / "notes.txt").read_text() == "mine"


# -- 4: metrics.jsonl ----------------------------------------------------------------------------


def test_metrics_that_are_damaged_are_cut_refused_or_missed(run, capsys):
    file = run / "metrics.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)

    file.write_bytes(whole + b'{"step": 9')  # a bad tail
    copy = shutil.copytree(run, run.parent / "copy" / "run")
    train(copy, **AUTO)
    assert (copy / "metrics.jsonl").read_bytes().startswith(whole)

    for damaged in (
        b"\xff" + whole[1:],
        whole.replace(b'"step": 2', b'"step": "'),
        b"a line\n" + whole,
        b'{"step": 1}\n' + whole,
        b"[" * 100_000 + b"\n" + whole,
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"metrics.jsonl(, line \d| is not as)"):
            train(run, **AUTO)
        assert file.read_bytes() == damaged

    file.write_bytes(b"".join(lines[:2]))
    capsys.readouterr()
    train(run, **AUTO)
    out = capsys.readouterr().out
    assert f"warning: {file} has {len(b''.join(lines[:2]))} of the {len(whole)} bytes" in out


def test_a_missing_metrics_file_is_said(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert train(run, **AUTO)[1] == 0
    assert "metrics.jsonl has 0 of" in capsys.readouterr().out


def test_the_state_of_the_metrics_is_that_of_the_file(tmp_path):
    records = MetricsFile(tmp_path / "metrics.jsonl")
    assert records.set_aside() is None
    for step in range(1, 4):
        records.add({"step": step})
        if step == 2:
            at_two = records.state()
    again = MetricsFile(tmp_path / "metrics.jsonl")
    assert again.cut_back(2, at_two) is None and again.state() == at_two
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


# -- 5: removed while a run writes ---------------------------------------------------------------


@pytest.mark.parametrize("anew", [False, True])
def test_a_run_whose_folder_is_removed_stops(tmp_path, anew):
    fault = functools.partial(remove_in_step, 4, tmp_path / "run", anew)
    started = faulty.start(
        tmp_path, fault=fault, **FLAGS | {"epochs": 3, "checkpointing_steps": 100}
    )
    assert started.wait() == [1], started.output()
    assert "was removed while this run was writing to it" in started.output()
    assert "Traceback" not in started.output()
    left = [path.name for path in tmp_path.glob("run/*")]
    assert sorted(left) == ([".lock", "theirs"] if anew else [])


def remove_in_step(step, folder, anew):
    import train as script

    def remove():
        shutil.rmtree(folder)
        if anew:
            folder.mkdir()
            (folder / ".lock").write_text(json.dumps(1))
            (folder / "theirs").write_text("another run's")

    script.draw_mixing = faulty.Nth(script.draw_mixing, step, remove)


# -- 7: a damaged checkpoint blocks nothing; 8: other signals; 13: other data on another process ---


@pytest.mark.parametrize("damage", ["nested", "pipe"])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(run, damage, capsys):
    newest = sorted((run / "checkpoints").iterdir())[-1]
    file = newest / ("manifest.json" if damage == "nested" else "model.safetensors")
    file.unlink()
    if damage == "nested":
        file.write_text("[" * 200_000 + "]" * 200_000)
    else:
        os.mkfifo(file)
    assert train(run, **AUTO)[1] == 0
    out = capsys.readouterr().out
    assert f"{newest} is damaged" in out and "step 2 of 4" in out


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_signals_of_batch_systems_leave_a_checkpoint(tmp_path, number):
    fault = functools.partial(signal_in_step, 3, number)
    flags = FLAGS | {"checkpointing_steps": 100, "epochs": 2}
    started = faulty.start(tmp_path, fault=fault, **flags)
    assert started.wait() == [143], started.output()
    assert f"{number.name}: a checkpoint after this step" in started.output()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    """As under nohup."""
    fault = functools.partial(signal_in_step, 3, signal.SIGHUP, ignored=True)
    assert faulty.start(tmp_path, fault=fault, **FLAGS).done()


def signal_in_step(step, number, ignored=False):
    import train as script

    if ignored:
        signal.signal(number, signal.SIG_IGN)
    act = functools.partial(os.kill, os.getpid(), number)
    script.draw_mixing = faulty.Nth(script.draw_mixing, step, act)


def test_processes_with_other_data_do_not_train(tmp_path):
    run = faulty.start(tmp_path, processes=2, fault=other_labels, **FLAGS)
    assert run.wait() == [2, 2], run.output()
    assert "process 1 on " in run.output() and "has data_sha256" in run.output()
    assert "Traceback" not in run.output()


def other_labels():
    """The second process reads its own copy of the data, and another one."""
    from harness.training import plan

    real = plan.load

    def load(dataset, options, accelerator):
        data = real(dataset, options, accelerator)
        if accelerator.process_index == 1:
            data.train.labels[:2] = data.train.labels[1::-1] + 1
        return data

    plan.load = load


def test_a_run_goes_on_with_more_parts_of_a_batch(run):
    assert train(run, **AUTO, gradient_accumulation_steps=4)[1] == 0

"""Stop anywhere, resume, and get the uninterrupted run: bit for bit."""

import errno
import hashlib
import json
import os
import shutil
import time

import psutil
import pytest
import torch
import yaml
from torch.nn.modules.batchnorm import _BatchNorm

import faulty
import smallruns
import train
from harness import files
from harness.cli import flags
from harness.errors import RunStopped, UserError
from harness.training import checkpoint
from harness.training.folder import FolderOptions, check_folder, claim_folder
from harness.training.metrics_file import read_metrics
from harness.training.record import Record
from harness.training.run import Run
from harness.training.verify_resume import compare, main

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    """A run's curves take a quarter of its time and are not what is looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "draw_curves", lambda self, step: None)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The digests of the run that was never stopped."""
    folder, status = smallruns.train(tmp_path_factory.mktemp("straight"), checkpointing_steps=5)
    assert status == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    return folder


@pytest.mark.parametrize(
    "stop",
    [s if s in (1, 6, 8) else pytest.param(s, marks=pytest.mark.sweep) for s in range(1, STEPS)],
)
def test_stopping_after_any_step_changes_nothing(straight, tmp_path, stop):
    _, status = smallruns.train(tmp_path, stop_after=stop)
    assert status == 0
    folder, status = smallruns.train(tmp_path, resume_from_checkpoint="auto", checkpointing_steps=5)
    assert status == 0
    assert smallruns.digest(folder) == smallruns.digest(straight)


def test_the_digest_sees_a_difference(straight, tmp_path):
    folder, _ = smallruns.train(tmp_path, seed=43)
    ours, theirs = smallruns.digest(folder), smallruns.digest(straight)
    assert ours.keys() == theirs.keys() and len(ours) == 6
    same = [name for name in ours if ours[name] == theirs[name]]
    assert same == ["step-00000012"]


def test_same_flags_same_bits_and_config_yaml_repeats_the_run(straight, tmp_path):
    recipe = straight / "config.yaml"
    folder, status = smallruns.train(tmp_path, config=recipe)
    assert status == 0
    assert smallruns.digest(folder) == smallruns.digest(straight)


def test_a_validation_split_chooses_the_epoch_also_across_a_resume(tmp_path):
    flags = {"val_fraction": 0.25, "epochs": 4}
    whole, _ = smallruns.train(tmp_path / "a", **flags)
    smallruns.train(tmp_path / "b", **flags, stop_after=10)
    (tmp_path / "b" / "run" / "model.safetensors").unlink()  # the best so far: a checkpoint has it
    parts, _ = smallruns.train(tmp_path / "b", **flags, resume_from_checkpoint="auto")
    assert smallruns.digest(whole) == smallruns.digest(parts)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, parts)]
    assert summaries[0]["best_epoch"] == summaries[1]["best_epoch"]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    assert summaries[0]["split"] == "test"
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    on_val = [r["val/acc_ema"] for r in records if "val/acc_ema" in r]
    assert summaries[0]["scores"]["val/acc_ema"] == max(on_val)  # of that epoch, not the last
    assert not any("test/acc" in r for r in records)  # test is scored once, at the end


FAST = {
    "model": "fastnet_small", "optimizer": "muon", "lr": 0.2, "head_lr": 0.02, "bias_lr": 2.0,
    "schedule": "linear", "flip": "alternating", "start_size": 12, "tta": "shift", "dropout": None,
}  # fmt: skip


@pytest.mark.slow
def test_the_fast_recipes_tricks_resume_bit_for_bit_and_score_several_views(tmp_path):
    whole, _ = smallruns.train(tmp_path / "a", **FAST)
    smallruns.train(tmp_path / "b", **FAST, stop_after=7)
    parts, _ = smallruns.train(tmp_path / "b", **FAST, resume_from_checkpoint="auto")
    assert smallruns.digest(whole) == smallruns.digest(parts)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, parts)]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    assert 0 <= summaries[0]["scores"]["test/acc_tta"] <= 1
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    rates = {k: v for k, v in records[0].items() if k.startswith("train/lr/")}
    assert set(rates) == {
        "train/lr/weight (muon)", "train/lr/head", "train/lr/norm_and_bias",
    }  # fmt: skip


def test_resuming_a_finished_run_says_the_same_result(straight):
    before = smallruns.digest(straight)
    summary = json.loads((straight / "summary.json").read_text())
    folder, status = smallruns.train(
        straight.parent, resume_from_checkpoint="auto", checkpointing_steps=5
    )
    assert status == 0
    assert smallruns.digest(folder) == before
    assert json.loads((folder / "summary.json").read_text())["scores"] == summary["scores"]


def test_another_flag_is_refused_by_name(straight):
    with pytest.raises(UserError, match=r"written with lr 0\.1, this command has 0\.2"):
        smallruns.train(straight.parent, resume_from_checkpoint="auto", lr=0.2)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(straight, tmp_path, capsys):
    smallruns.train(tmp_path, checkpointing_steps=3, stop_after=8)
    folder = tmp_path / "run"
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    capsys.readouterr()
    _, status = smallruns.train(tmp_path, resume_from_checkpoint="auto", checkpointing_steps=5)
    out = capsys.readouterr().out
    assert status == 0
    assert f"{newest} is damaged (optimizer.safetensors has another sha256" in out
    assert "step 6 of 12" in out
    assert smallruns.digest(folder) == smallruns.digest(straight)


def test_a_folder_that_holds_a_run_is_refused_and_overwrite_replaces_it(straight, tmp_path):
    smallruns.train(tmp_path, epochs=1)
    with pytest.raises(UserError, match="holds a run already"):
        smallruns.train(tmp_path, epochs=1)
    folder, status = smallruns.train(tmp_path, overwrite=True, checkpointing_steps=5)
    assert status == 0
    assert smallruns.digest(folder) == smallruns.digest(straight)
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] == 3


def test_a_run_that_came_between_is_not_thrown_away(tmp_path):
    """Another start trains in the folder while this one decodes its images."""
    args = train.read_flags(smallruns.words({**smallruns.SMALL, "output_dir": tmp_path}))
    folder = check_folder(flags.pick(FolderOptions, args), "digits", "train.py")
    smallruns.train(tmp_path, stop_after=2)
    with pytest.raises(UserError, match="another process has trained"):
        claim_folder(folder, flags.to_recipe(args), False, None, "train.py")
    _, status = smallruns.train(tmp_path, resume_from_checkpoint="auto")
    assert status == 0


def test_the_runs_folder_is_no_checkpoint_and_a_reports_folder_no_runs(tmp_path):
    folder, _ = smallruns.train(tmp_path, stop_after=2)
    with pytest.raises(UserError, match=r"is the run's folder: give auto"):
        smallruns.train(tmp_path, resume_from_checkpoint=folder)
    (folder / "report.json").write_text("{}")  # decides nothing
    assert smallruns.train(tmp_path, resume_from_checkpoint="auto")[1] == 0
    with pytest.raises(UserError, match=r"holds what train.py wrote"):
        smallruns.ensemble(tmp_path, folder, run_name="run")


def test_stopped_where_it_would_stop(tmp_path, capsys):
    folder, _ = smallruns.train(tmp_path, stop_after=2)
    before = smallruns.digest(folder)
    _, status = smallruns.train(tmp_path, stop_after=2, resume_from_checkpoint="auto")
    assert status == 0 and "stopped already: --stop_after 2" in capsys.readouterr().out
    assert smallruns.digest(folder) == before


@pytest.mark.slow
def test_all_processes_are_told_of_a_checkpoint_that_is_none(tmp_path):
    run = faulty.start(tmp_path, processes=2, resume_from_checkpoint=tmp_path / "nothing")
    assert run.wait() == [2, 2]
    assert "Traceback" not in run.output() and run.output().count("nothing: No such") == 1


def test_a_flag_that_an_older_version_did_not_know_counts_as_its_default():
    from harness.training.state import check_identity

    saved = {"lr": 0.1, "flip_prob": 0.5}
    check_identity("step-1", saved, saved | {"flip": "random"}, flag_names={"lr"})
    for given, ours in (({"flip": "here"}, saved | {"flip": "alternating"}), ({}, {"lr": 0.1})):
        with pytest.raises(UserError, match="step-1 was written with flip"):
            check_identity("step-1", saved, ours, given)


def test_a_data_set_elsewhere_is_continued_where_its_images_are_the_same():
    from harness.training.state import check_identity

    saved = {"dataset": "/mnt/a", "content": {"train": [9, "ab"]}}
    moved = saved | {"dataset": "/mnt/b"}
    check_identity("step-1", saved, moved, {"dataset"})
    fewer = moved | {"content": {"train": [8, "cd"]}}
    with pytest.raises(UserError, match=r"with dataset /mnt/a, and /mnt/b has other.* 1 fewer"):
        check_identity("step-1", saved, fewer, {"dataset"})
    for content in ({}, {"content": {"train": [9, "ab"]}}):  # a checkpoint, or images, without
        old, new = {"dataset": "/mnt/a", **content}, {"dataset": "/mnt/b"}
        for one, other in ((old, new), (new, old)):
            with pytest.raises(UserError, match=r"was written with dataset .* this command has"):
                check_identity("step-1", one, other, {"dataset"})


def test_a_checkpoint_of_other_data_is_refused(straight, tmp_path):
    checkpoint = sorted((straight / "checkpoints").iterdir())[-1]
    with pytest.raises(UserError, match="max_train_samples 200, this command has 150"):
        smallruns.train(tmp_path, max_train_samples=150, resume_from_checkpoint=checkpoint)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_path_into_another_runs_checkpoints_is_refused_where_a_run_stands(straight, tmp_path):
    smallruns.train(tmp_path, epochs=1)
    other = sorted((straight / "checkpoints").iterdir())[-1]
    before = smallruns.digest(tmp_path / "run")
    with pytest.raises(UserError, match="holds another run"):
        smallruns.train(tmp_path, resume_from_checkpoint=other)
    assert smallruns.digest(tmp_path / "run") == before


def test_resuming_an_older_checkpoint_by_name_sets_the_later_ones_aside(straight, tmp_path):
    smallruns.train(tmp_path, checkpointing_steps=3, max_checkpoints=9, stop_after=8)
    root = tmp_path / "run" / "checkpoints"
    older = root / "step-00000003"
    smallruns.train(tmp_path, resume_from_checkpoint=older, checkpointing_steps=99, stop_after=5)
    names = sorted(p.name for p in root.iterdir())
    assert names == ["set-aside-step-00000006", "set-aside-step-00000008",
                     "step-00000003", "step-00000005"]  # fmt: skip
    folder, _ = smallruns.train(tmp_path, resume_from_checkpoint="auto", checkpointing_steps=5)
    for late in root.glob("set-aside-*"):
        shutil.rmtree(late)
    assert smallruns.digest(folder) == smallruns.digest(straight)


def test_a_finished_run_without_its_checkpoints_is_not_thrown_away(tmp_path):
    folder, _ = smallruns.train(tmp_path, epochs=1)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="had a checkpoint of step 4, and has none now"):
        smallruns.train(tmp_path, epochs=1, resume_from_checkpoint="auto")
    assert (folder / "model.safetensors").exists()


# --- a checkpoint that can't be written ---


def fails_at(monkeypatch, steps, error):
    """Let the writer fail at the checkpoints of these steps."""

    def write(path, data, real=checkpoint.write_synced):
        if any(f"step-{step:08d}-" in path.parent.name for step in steps):
            raise error
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_synced", write)


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_in_the_background_is_a_warning_and_training_goes_on(
    straight, tmp_path, monkeypatch, capsys
):
    fails_at(monkeypatch, [5, 6], FULL)
    folder, status = smallruns.train(tmp_path, checkpointing_steps=1)
    out = capsys.readouterr().out
    assert status == 0 and smallruns.digest(folder) == smallruns.digest(straight)
    for step in (5, 6):
        assert out.count(f"warning: no checkpoint of step {step}: [Errno 28] No space left") == 1
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.parametrize("flags", [{"epochs": 1}, {"stop_after": 4}], ids=["end", "stop"])
def test_a_last_checkpoint_that_fails_is_an_error(tmp_path, monkeypatch, flags):
    fails_at(monkeypatch, [4], FULL)
    with pytest.raises(RunStopped, match=r"checkpoint .*could not be written: .*No space left"):
        smallruns.train(tmp_path, checkpointing_steps=3, **flags)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-00000003"]
    # What was learned is not lost for it
    assert (tmp_path / "run" / "model.safetensors").exists() == ("epochs" in flags)


def test_a_mistake_in_the_writer_comes_to_light(tmp_path, monkeypatch):
    fails_at(monkeypatch, [3], ZeroDivisionError("a mistake"))
    with pytest.raises(ZeroDivisionError):
        smallruns.train(tmp_path, checkpointing_steps=3)


def test_the_best_epoch_on_disk_is_never_ahead_of_the_checkpoints(tmp_path, monkeypatch):
    """model.safetensors is written after a checkpoint that has it, or the epoch it is found in."""
    seen = []

    def write(path, data, real=files.write_synced):
        if path.name == ".model.safetensors.writing":
            newest = checkpoint.checkpoints(path.parent / "checkpoints")[-1]
            tensors, state = checkpoint.load_checkpoint(newest)
            kept = tensors["best" if state["unscored"] is None else "ema"]
            assert files.result_bytes(kept)[0] == bytes(data)
            seen.append(newest.name)
        real(path, data)

    monkeypatch.setattr(files, "write_synced", write)
    _, status = smallruns.train(tmp_path, val_fraction=0.25, batch_size=24, epochs=2)
    assert status == 0 and seen


# --- --nonfinite skip ---


def poison(monkeypatch, steps):
    """NaN into BatchNorm in training at these steps: statistics, loss and gradients."""
    now, forward, real = {}, _BatchNorm.forward, Run.steps

    def counted(run, *args, **kwargs):
        for step, batch in real(run, *args, **kwargs):
            now["bad"] = step in steps
            yield step, batch
            now["bad"] = False

    def poisoned(norm, x):
        return forward(norm, x * float("nan") if now.get("bad") and norm.training else x)

    monkeypatch.setattr(Run, "steps", counted)
    monkeypatch.setattr(_BatchNorm, "forward", poisoned)


def fuse(monkeypatch):
    """The fused optimizer and its found_inf, which a GPU has, on the CPU."""

    def make(args, parameters, accelerator, lr):
        return torch.optim.SGD(parameters, lr, args.momentum, nesterov=True, fused=True)

    monkeypatch.setattr(train, "make_optimizer", make)


def states(folder):
    """{step: sha256 of model, averages and optimizer}."""
    return {
        int(path.name[5:]): [
            hashlib.sha256((path / f"{name}.safetensors").read_bytes()).hexdigest()
            for name in ("model", "ema", "optimizer")
        ]
        for path in checkpoint.checkpoints(folder / "checkpoints")
    }


SKIP = {"nonfinite": "skip", "checkpointing_steps": 1, "max_checkpoints": 99, "logging_steps": 1}


@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["host", "device"]
)
def test_a_skipped_step_leaves_no_trace_and_is_counted(tmp_path, monkeypatch, fused):
    if fused:
        fuse(monkeypatch)
    poison(monkeypatch, {5, 8, 9})
    folder, status = smallruns.train(tmp_path / "whole", **SKIP)
    assert status == 0
    found = states(folder)
    same = [s for s in found if s > 1 and found[s] == found[s - 1]]
    assert same == [6, 9, 10]  # and all others differ in each
    assert all(a != b for a, b in zip(found[7], found[6], strict=True))
    tensors, _ = checkpoint.load_checkpoint(folder / "checkpoints/step-00000012")
    floats = [t for group in tensors.values() for t in group.values() if t.is_floating_point()]
    assert floats and all(torch.isfinite(t).all() for t in floats)
    records = {r["step"]: r for r in read_metrics(folder / "metrics.jsonl") if "train/lr" in r}
    assert [records[s]["train/nonfinite"] for s in (5, 6, 9, 12)] == [0, 1, 2, 3]
    assert "train/loss" in records[5] and "train/loss" not in records[6]
    assert json.loads((folder / "summary.json").read_text())["nonfinite"] == 3

    for stop in (6, 9):
        smallruns.train(tmp_path / str(stop), **SKIP, stop_after=stop)
        parts, _ = smallruns.train(tmp_path / str(stop), **SKIP, resume_from_checkpoint="auto")
        assert smallruns.digest(parts) == smallruns.digest(folder)
        assert json.loads((parts / "summary.json").read_text())["nonfinite"] == 3


@pytest.mark.parametrize("fused", [False, True], ids=["host", "device"])
def test_a_run_whose_first_step_is_skipped(tmp_path, monkeypatch, fused):
    """A fused SGD would leave the momentum of a withheld first step uninitialised."""
    if fused:
        fuse(monkeypatch)
    poison(monkeypatch, {0})
    folder, status = smallruns.train(tmp_path, **SKIP, stop_after=2)
    assert status == 0
    first, _ = checkpoint.load_checkpoint(folder / "checkpoints/step-00000001")
    assert not first["optimizer"]
    second, _ = checkpoint.load_checkpoint(folder / "checkpoints/step-00000002")
    assert all(t.abs().max() < 1e3 for t in second["optimizer"].values())


def test_skipping_where_nothing_is_bad_changes_nothing(straight, tmp_path):
    folder, _ = smallruns.train(tmp_path, nonfinite="skip", checkpointing_steps=5)
    ours, theirs = smallruns.digest(folder), smallruns.digest(straight)
    assert ours.pop("metrics.jsonl") != theirs["metrics.jsonl"]  # it has train/nonfinite
    assert ours.items() <= theirs.items()


def test_ten_in_a_row_stop_the_run_also_across_a_resume(tmp_path, monkeypatch):
    poison(monkeypatch, range(1, 99))
    flags = {**SKIP, "max_checkpoints": 2}
    smallruns.train(tmp_path, **flags, stop_after=6)
    with pytest.raises(RunStopped, match=r"step 11: loss is nan.*9 skipped ones, .*step-00000010"):
        smallruns.train(tmp_path, **flags, resume_from_checkpoint="auto")


def test_a_run_that_stopped_goes_on_with_skip(tmp_path, monkeypatch):
    poison(monkeypatch, {6})
    with pytest.raises(RunStopped, match=r"step 7: loss is nan.*is .*step-00000006"):
        smallruns.train(tmp_path, checkpointing_steps=3)
    folder, status = smallruns.train(
        tmp_path, nonfinite="skip", checkpointing_steps=3, resume_from_checkpoint="auto"
    )
    assert status == 0
    assert json.loads((folder / "summary.json").read_text())["nonfinite"] == 1


def poison_on_one():
    """Process 1 alone meets an infinite loss at the third step."""
    from harness.training.run import Run

    count = Run.count

    def poisoned(run, loss, acc):
        bad = os.environ["RANK"] == "1" and run.step == 2
        count(run, loss + float("inf") if bad else loss, acc)

    Run.count = poisoned


@pytest.mark.slow
def test_two_processes_skip_alike_and_resume(tmp_path):
    flags = {**SKIP, "epochs": 2, "processes": 2, "fault": poison_on_one}
    whole = faulty.start(tmp_path / "whole", **flags)
    faulty.start(tmp_path / "parts", stop_after=3, **flags).done()
    parts = faulty.start(tmp_path / "parts", resume_from_checkpoint="auto", **flags).done()
    assert smallruns.digest(whole.done()) == smallruns.digest(parts)
    found = states(parts)
    assert [s for s in found if s > 1 and found[s] == found[s - 1]] == [3]
    assert json.loads((parts / "summary.json").read_text())["nonfinite"] == 1


TWO = ("--config_file", str(smallruns.ROOT / "accelerate_configs" / "cpu_2proc.yaml"))


VERIFY = {"deterministic": True, "epochs": 2, "gradient_accumulation_steps": 1}
PASSED = "PASS: 6 steps, killed and resumed at 3: 7 records"


@pytest.mark.parametrize(
    "launcher",
    [pytest.param((), marks=pytest.mark.slow), pytest.param(TWO, marks=pytest.mark.sweep)],
    ids=["one process", "two processes"],
)
def test_verify_resume_passes(tmp_path, launcher):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    ended = smallruns.verify_resume(
        tmp_path, 6, launcher=launcher, env={"TMPDIR": str(temporary)}, **VERIFY
    )
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count(PASSED) == 1
    assert not list(temporary.rglob("metrics.jsonl"))  # it leaves nothing


def compared(straight, tmp_path, change):
    """What verify_resume says of a run and of a copy that `change(folder)` has been at."""
    copy = tmp_path / "copy"
    shutil.copytree(straight, copy)
    change(copy)
    return compare(straight, copy, STEPS)


def test_verify_resume_names_the_first_difference(straight, tmp_path, capsys):
    from harness.training.checkpoint import load_checkpoint, save_checkpoint

    assert compared(straight, tmp_path, lambda folder: None).startswith("PASS: 12 steps")

    def another_loss(folder):
        file = folder / "metrics.jsonl"
        lines = file.read_text().splitlines()
        lines[1] = json.dumps(json.loads(lines[1]) | {"train/loss": 9.5})
        file.write_text("\n".join(lines) + "\n")

    with pytest.raises(RunStopped, match=r"FAIL: step \d+: train/loss is 9.5"):
        compared(straight, tmp_path / "a", another_loss)

    def another_tensor(folder):
        newest = sorted((folder / "checkpoints").iterdir())[-1]
        tensors, state = load_checkpoint(newest)
        tensors["ema"]["fc.bias"] = tensors["ema"]["fc.bias"] + 0.25
        save_checkpoint(newest.parent, STEPS, tensors, state, 2)

    with pytest.raises(RunStopped, match=r"FAIL: after step 12: ema fc.bias differs by up to 0.25"):
        compared(straight, tmp_path / "b", another_tensor)


@pytest.mark.slow
def test_verify_resume_takes_its_runs_with_it(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = smallruns.verify_resume(
        tmp_path, 300, wait=False, epochs=99, env={"TMPDIR": str(temporary)}
    )
    end = time.monotonic() + 120
    while not list(temporary.rglob("metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    runs = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(20) == 143
    assert len(runs) >= 2 and not any(psutil.pid_exists(run.pid) for run in runs)
    assert not list(temporary.rglob("metrics.jsonl"))
    process.stdout.close()


def test_verify_resume_of_a_shorter_run_is_refused(straight):
    with pytest.raises(UserError, match="99 steps were asked for, the run ends after 12"):
        compare(straight, straight, 99)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "usage: "), (["train.py"], "usage: "), (["1", "train.py"], "usage: "),
        (["4", "no-such-command"], "no-such-command can't be started: No such file"),
        (["4", "true"], "the command ended without a step"),
        (["4", "false"], "a run ended with status 1"),
    ],
)  # fmt: skip
def test_what_is_no_training_command_gets_a_line(words, line):
    with pytest.raises(SystemExit, match=line):
        main(words)


def test_the_flag_of_before_names_the_command(capsys):
    with pytest.raises(SystemExit):
        train.read_flags(["--verify_resume", "20"])
    assert "python -m harness.training.verify_resume STEPS" in capsys.readouterr().err


def test_deterministic_changes_nothing_on_a_cpu(straight, tmp_path):
    folder, status = smallruns.train(tmp_path, deterministic=True, checkpointing_steps=5)
    assert status == 0
    assert smallruns.digest(folder) == smallruns.digest(straight)

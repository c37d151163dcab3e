"""train.py as a user runs it: launched, on one and two processes, stopped, tracked."""

import contextlib
import json
import os
import shutil
import signal

import pytest
import safetensors.torch
import torch

import faulty
import smallruns
from harness.errors import RunStopped, UserError
from harness.models import build
from harness.models.weights import load_state
from harness.training.metrics_file import read_metrics

TWO = ("--config_file", str(smallruns.ROOT / "accelerate_configs" / "cpu_2proc.yaml"))
ONE = ("--config_file", str(smallruns.ROOT / "accelerate_configs" / "cpu.yaml"))
# Without BatchNorm, whose statistics depend on how the batch is cut; without dropout, which is
# drawn by each process for itself.
PLAIN = {
    "model": "squeezenet1_1", "image_size": 32, "dropout": 0, "mixed_precision": "no", "lr": 0.02,
    "logging_steps": 1, "epochs": 2, "gradient_accumulation_steps": 1,
}  # fmt: skip


def losses(folder):
    return {r["step"]: r["train/loss"] for r in read_metrics(folder / "metrics.jsonl")
            if "train/loss" in r}  # fmt: skip


@pytest.mark.slow
def test_two_launched_processes_give_the_losses_of_one_and_resume_bit_for_bit(tmp_path):
    flags = PLAIN
    (tmp_path / "two").mkdir()
    stopped = faulty.start(tmp_path / "stopped", processes=2, stop_after=3, **flags)
    two = smallruns.launch(tmp_path / "two", launcher=TWO, **flags)
    assert two.returncode == 0, two.stdout
    assert "CPU × 2 processes" in two.stdout
    one, _ = smallruns.train(tmp_path / "one", **flags)
    ours, theirs = losses(one), losses(tmp_path / "two" / "run")
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for step, loss in ours.items():
        assert theirs[step] == pytest.approx(loss, abs=1e-4), f"step {step}"

    stopped.done()
    resumed = faulty.start(
        tmp_path / "stopped", processes=2, resume_from_checkpoint="auto", **flags
    ).done()
    assert smallruns.digest(resumed) == smallruns.digest(tmp_path / "two" / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes", "number"),
    [
        pytest.param(ONE, 1, signal.SIGINT, id="one process-SIGINT"),
        pytest.param(TWO, 2, signal.SIGTERM, id="two processes-SIGTERM"),
        pytest.param(ONE, 1, signal.SIGTERM, id="one process-SIGTERM", marks=pytest.mark.sweep),
        pytest.param(TWO, 2, signal.SIGINT, id="two processes-SIGINT", marks=pytest.mark.sweep),
    ],
)
def test_a_signal_publishes_a_checkpoint_and_the_resumed_run_is_the_same(
    tmp_path, launcher, processes, number
):
    """Other places and signals, without a launcher: tests/faults/test_kill.py."""
    import psutil

    flags = {
        "epochs": 12, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "checkpointing_steps": 100,
    }  # fmt: skip
    (tmp_path / "stopped").mkdir()
    process = smallruns.launch(tmp_path / "stopped", launcher=launcher, wait=False, **flags)
    folder = tmp_path / "stopped" / "run"
    smallruns.wait_for_step(folder, 5, process)
    workers = psutil.Process(process.pid).children()
    workers[-1].send_signal(number)  # to one process only
    output, _ = process.communicate(timeout=60)
    assert f"{number.name}: a checkpoint after this step" in output or processes == 2
    assert "stopped at step" in output, output
    assert str(smallruns.SIGNALS[number]) in output  # the launcher names the status it saw
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)
    step = int(sorted((folder / "checkpoints").iterdir())[-1].name[5:])
    assert 5 <= step < 48
    whole = faulty.start(tmp_path / "whole", processes=processes, **flags)
    resumed = faulty.start(
        tmp_path / "stopped", processes=processes, resume_from_checkpoint="auto", **flags
    )
    assert smallruns.digest(resumed.done()) == smallruns.digest(whole.done())


@pytest.mark.slow
def test_killing_the_launcher_stops_the_training_with_a_checkpoint(tmp_path):
    import psutil

    process = smallruns.launch(tmp_path, launcher=ONE, wait=False, epochs=40, logging_steps=1)
    folder = tmp_path / "run"
    smallruns.wait_for_step(folder, 3, process)
    worker = psutil.Process(process.pid).children()[0]
    process.terminate()
    worker.wait(timeout=60)
    assert len(list((folder / "checkpoints").iterdir())) >= 1


def test_a_non_finite_loss_stops_before_the_update_with_the_step_named(tmp_path):
    flags = {"warmup_epochs": 0, "checkpointing_steps": 1, "gradient_accumulation_steps": 1}
    with pytest.raises(RunStopped, match=r"step (\d+): loss is .*the last good checkpoint is") as e:
        smallruns.train(tmp_path, lr=1e4, weight_decay=1000, mixed_precision="no", **flags)
    step = int(str(e.value).split(":")[0].removeprefix("step "))
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert int(checkpoints[-1].name[5:]) == step - 1
    weights = safetensors.torch.load_file(checkpoints[-1] / "optimizer.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())


def poison_on_one():
    """Process 1 meets, at its third step, an infinite loss with finite gradients."""
    from harness.training import imbalance

    real, calls = imbalance.soft_cross_entropy, []

    def poisoned(logits, targets):
        calls.append(1)
        bad = os.environ["RANK"] == "1" and len(calls) == 3
        return real(logits, targets) + (float("inf") if bad else 0)

    imbalance.soft_cross_entropy = poisoned


@pytest.mark.slow
def test_a_non_finite_loss_on_one_process_stops_both(tmp_path):
    flags = {"gradient_accumulation_steps": 1, "checkpointing_steps": 1}
    run = faulty.start(tmp_path, processes=2, fault=poison_on_one, **flags)
    assert all(run.wait()), run.output()
    assert "step 3: loss is inf" in run.output()
    names = [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names[-1] == "step-00000002"


@pytest.mark.slow
def test_a_compiled_model_is_saved_under_clean_names_and_resumes(tmp_path, monkeypatch):
    plain, _ = smallruns.train(tmp_path / "plain", epochs=1)
    # "eager" goes the whole way through torch.compile but for a compiler, which may be missing.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    smallruns.train(tmp_path / "compiled", epochs=1, stop_after=2)
    folder, status = smallruns.train(tmp_path / "compiled", epochs=1, resume_from_checkpoint="auto")
    assert status == 0
    files = [
        folder / "model.safetensors",
        *sorted((folder / "checkpoints").glob("*/*.safetensors")),
    ]
    assert len(files) == 7
    for file in files:
        assert "_orig_mod" not in " ".join(safetensors.torch.load_file(file))
    ours, theirs = (safetensors.torch.load_file(f / "model.safetensors") for f in (folder, plain))
    assert ours.keys() == theirs.keys()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, W&B offline."""
    output_dir = tmp_path_factory.mktemp("finished")
    folder, status = smallruns.train(output_dir, report_to="wandb", group="tests", epochs=2)
    assert status == 0
    return folder


def test_a_run_writes_what_the_readme_says(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "config.yaml", "model.safetensors", "config.json", "summary.json", "metrics.jsonl",
        "curves.png", "train_batch.png", "checkpoints", "wandb",
    }  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["weights"] == "ema" and summary["split"] == "test"
    assert summary["data"]["splits"] == {"train": 200, "test": 100}
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_result_is_rebuilt_from_its_config_and_scores_the_same(finished):
    config = json.loads((finished / "config.json").read_text())
    model = build.rebuild_model(config)
    load_state(model, safetensors.torch.load_file(finished / "model.safetensors"))
    assert config["label_names"] == [str(d) for d in range(10)]
    assert config["weights"] == "ema" and config["metric"] == "top-1 accuracy"
    from harness.data.sources import load_data
    from harness.data.stores import decode_splits
    from harness.models.trained import read_trained
    from harness.training.scoring import evaluate
    from tricks.augment import normalize_batch

    class Alone:  # an accelerator as evaluate sees it
        device, process_index, num_processes = torch.device("cpu"), 0, 1
        autocast = contextlib.nullcontext

        @staticmethod
        def reduce(sums, how):
            return sums

    data = load_data("digits", max_eval_samples=100)
    cfg = config["pretrained_cfg"]
    splits = decode_splits(data, read_trained(finished).preprocessing, progress=False)
    scores = evaluate(
        Alone, model, splits["test"], lambda x: normalize_batch(x, cfg["mean"], cfg["std"])
    )
    summary = json.loads((finished / "summary.json").read_text())
    assert scores["acc"] == pytest.approx(summary["accuracy"], abs=0.021)  # fp32 against bf16
    assert scores["loss"] == pytest.approx(summary["loss"], rel=0.02)


def test_metrics_have_every_interval_and_epoch(finished):
    records = read_metrics(finished / "metrics.jsonl")
    train = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in train] == [3, 6, 8]
    assert all({"train/lr", "train/grad_norm", "train/mixed_acc"} <= r.keys() for r in train)
    epochs = [r for r in records if "epoch/loss" in r]
    assert [r["epoch"] for r in epochs] == [1.0, 2.0]
    assert all(
        {"test/acc", "test/acc_ema", "test/loss", "test/loss_ema"} <= r.keys() for r in epochs
    )


def test_a_short_run_has_something_in_every_panel(tmp_path, monkeypatch):
    """Its epochs are shorter than --logging_steps: metrics are written at their ends."""
    from matplotlib.axes import Axes

    said, text = [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda *a, **k: said.append(a[3]) or text(*a, **k))
    folder, _ = smallruns.train(tmp_path, logging_steps=10, epochs=3)
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records if "train/loss" in r] == [4, 8, 10, 12]
    assert "nothing recorded" not in said


def test_wandb_offline_has_the_numbers_of_metrics_jsonl(finished):
    from test_tracking import history, read_wandb

    (run,) = read_wandb(finished)
    ours = read_metrics(finished / "metrics.jsonl")
    theirs = [r for r in history(run) if "train/loss" in r or "epoch/loss" in r]
    assert theirs == ours and len(ours) == 5


def test_bad_input_is_one_line_that_names_it(tmp_path):
    cases = [
        ({"model": "resnet81"}, 'unknown model "resnet81".*did you mean "resnet'),
        ({"dataset": "cifar11"}, 'unknown data set "cifar11", did you mean "cifar1'),
        ({"batch_size": 47}, "--batch_size 47 is not divisible by 1 processes × 2"),
        ({"batch_size": 50}, "is 25 images at a time, an odd number"),
        ({"batch_size": 400}, "--batch_size 400 is more than the 200 train images"),
        ({"weights": "nope.pth"}, "no weights at nope.pth"),
        ({"label_column": "lable"}, 'did you mean "label"'),
        ({"report_to": "wandbb"}, 'did you mean "wandb"'),
        ({"val_split": "tset"}, 'did you mean "test"'),
        ({"image_size": 4, "model": "vit_b_16"}, "does not run at 4 px"),
        ({"mixed_precision": "fp16"}, r"fp16 \(--mixed_precision\) needs a GPU"),
        (
            {"max_train_samples": 5, "batch_size": 2},
            "--max_train_samples 5 keeps images of only 5 of 10",
        ),
    ]
    for flags, message in cases:
        with pytest.raises(UserError, match=message):
            smallruns.train(tmp_path, **flags)
        assert not (tmp_path / "run").exists(), f"{flags} left something behind"


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    _, status = smallruns.train(tmp_path, dry_run=True)
    out = capsys.readouterr().out
    assert status == 0 and not any(tmp_path.iterdir())
    for fact in ("200 train, 100 test", "373,658 parameters", "12 = 3 epochs of 4",
                 "48 = 1 processes × 2 accumulation × 24",
                 # (1 + 11) / (10 + 11): the warm-up ends this run
                 "decay 0.9, in the end 0.5714 (warm-up): half-life 1 steps"):  # fmt: skip
        assert fact in out
    smallruns.train(tmp_path, dry_run=True, test_split="none")
    assert "no validation or test images: --val_fraction 0.1" in capsys.readouterr().out
    smallruns.train(tmp_path, dry_run=True, ema_decay=0.3)
    assert "decay 0.3: half-life 1 steps" in capsys.readouterr().out


def test_a_folder_in_use_by_another_process_is_refused(tmp_path, finished):
    import fcntl

    shutil.copytree(finished, tmp_path / "run")
    with open(tmp_path / "run" / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by process"):
            smallruns.train(tmp_path, report_to="none", overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").exists()

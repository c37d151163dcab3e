"""Numbers that are none: never the best, never averaged in, never a result."""

import json

import pytest
import torch
from safetensors.torch import load_file

import smallruns
from harness.errors import RunStopped, UserError

FLAGS = {"batch_size": 24, "epochs": 3, "val_fraction": 0.25, "dropout": 0}


def poison_evaluation(monkeypatch, epoch):
    from harness.training import scoring

    real, calls = scoring.score, []

    def score(*args):
        calls.append(1)
        found = real(*args)
        bad = {name: float("nan") if "loss" in name else 1.0 for name in found}
        return bad if len(calls) == epoch else found

    monkeypatch.setattr(scoring, "score", score)


@pytest.mark.everyday
def test_a_nan_in_evaluation_is_never_best(tmp_path, monkeypatch):
    poison_evaluation(monkeypatch, 2)  # accuracy 1.0, loss NaN
    folder, status = smallruns.train(tmp_path, **FLAGS)
    assert status == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_epoch"] in (1, 3) and summary["loss"] == summary["loss"]


def poison_buffer(monkeypatch, step):
    """A BatchNorm buffer becomes NaN in a step whose loss and gradients are finite."""
    import train

    real = train.draw_mixing
    seen = []

    def draw_mixing(*args):
        seen.append(1)
        if len(seen) == step + 1:
            found = [m for m in poison_buffer.model.modules()
                     if isinstance(m, torch.nn.BatchNorm2d)]  # fmt: skip
            found[0].running_var.fill_(float("nan"))
        return real(*args)

    real_build = train.build.build_model

    def build_model(*args, **options):
        poison_buffer.model = real_build(*args, **options)
        return poison_buffer.model

    monkeypatch.setattr(train, "draw_mixing", draw_mixing)
    monkeypatch.setattr(train.build, "build_model", build_model)


@pytest.mark.parametrize("val", [0.25, 0.0])
def test_a_nan_in_a_batchnorm_buffer_is_in_no_result(tmp_path, monkeypatch, val):
    """Stopped with the step named, or kept out; never a result of NaN, and never silently."""
    poison_buffer(monkeypatch, 10)
    flags = {**FLAGS, "val_fraction": val, "checkpointing_steps": 1, "max_checkpoints": 99}
    try:
        smallruns.train(tmp_path, **flags)
    except (RunStopped, UserError) as stopped:
        assert "step" in str(stopped)
    result = tmp_path / "run" / "model.safetensors"
    files = [*(tmp_path / "run" / "checkpoints").glob("*/ema.safetensors")]
    files += [result] if result.exists() else []
    assert files
    for file in files:
        for name, tensor in load_file(file).items():
            assert torch.isfinite(tensor).all(), f"{file.parent.name}/{file.name}: {name}"


def test_the_poison_works(tmp_path, monkeypatch):
    """Without a guard the buffer would make the evaluation NaN."""
    model = torch.nn.BatchNorm2d(3)
    model.running_var.fill_(float("nan"))
    assert not torch.isfinite(model.eval()(torch.ones(2, 3, 4, 4))).all()

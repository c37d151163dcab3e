"""The table of metrics, against scikit-learn, torchmetrics and scipy; what a run does with it."""

import json
import math

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
import torchmetrics.functional.classification as torchmetrics
from scipy.stats import binomtest
from training.test_scoring import Alone, Network, make_split, prepare

import faulty
import smallruns
from harness.cli import flags
from harness.errors import UserError
from harness.metrics import METRICS, is_better, wilson_interval
from harness.training.metrics_file import read_metrics
from harness.training.scoring import evaluate


def made(n=500, classes=7, seed=0, counts=None):
    """Logits that know something, and labels that are uneven."""
    rng = torch.Generator().manual_seed(seed)
    weights = torch.tensor(counts or [2.0**-k for k in range(classes)])
    labels = torch.multinomial(weights, n, replacement=True, generator=rng)
    logits = torch.randn(n, classes, generator=rng, dtype=torch.float64)
    logits = logits + 1.5 * torch.nn.functional.one_hot(labels, classes)
    return logits.mul(4).round().div(4) - 1e-6 * torch.arange(classes), labels  # with ties


def value(name, logits, labels):
    metric = METRICS[name]
    if metric.of_all:
        return metric.of_all(logits, labels)
    return metric.batch_sum(logits, labels).item() / len(labels)


def test_the_flags_know_every_metric():
    assert list(flags.METRICS) == list(METRICS)
    for name, metric in METRICS.items():
        assert (metric.batch_sum is None) != (metric.of_all is None), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_every_metric_equals_scikit_learns(classes, seed):
    logits, labels = made(classes=classes, seed=seed)
    p, y = logits.softmax(1).numpy(), labels.numpy()
    one_hot, predicted = np.eye(classes)[y], p.argmax(1)
    there = one_hot.any(0) & ~one_hot.all(0)
    expected = {
        "loss": reference.log_loss(y, p, labels=range(classes)),
        "acc": reference.accuracy_score(y, predicted),
        "balanced_acc": reference.balanced_accuracy_score(y, predicted),
        "macro_f1": reference.f1_score(y, predicted, average="macro"),
        "auroc": reference.roc_auc_score(one_hot[:, there], p[:, there], average="macro"),
        "ap": reference.average_precision_score(one_hot[:, there], p[:, there], average="macro"),
    }
    if classes > 5:  # the reference wants more classes than k
        expected["top5"] = reference.top_k_accuracy_score(y, p, k=5, labels=range(classes))
    for name, wanted in expected.items():
        assert value(name, logits, labels) == pytest.approx(wanted, rel=1e-9), name


def test_metrics_equal_torchmetrics():
    logits, labels = made(classes=5)
    p = logits.softmax(1)
    many = {"num_classes": 5, "average": "macro"}
    expected = {
        "balanced_acc": torchmetrics.multiclass_accuracy(p, labels, **many),
        "macro_f1": torchmetrics.multiclass_f1_score(p, labels, **many),
        "auroc": torchmetrics.multiclass_auroc(p, labels, **many),
        "ap": torchmetrics.multiclass_average_precision(p, labels, **many),
        "ece": torchmetrics.multiclass_calibration_error(p, labels, num_classes=5),
    }
    for name, wanted in expected.items():
        assert value(name, logits, labels) == pytest.approx(wanted.item(), abs=2e-6), name


def test_a_class_without_samples_has_no_part_in_the_means():
    logits, labels = made(counts=[5.0, 3, 0, 2, 1, 1, 1])
    assert 2 not in labels
    without = torch.cat([logits[:, :2], logits[:, 3:]], 1)
    recalls = [(logits.argmax(1)[labels == k] == k).double().mean() for k in (0, 1, 3, 4, 5, 6)]
    assert value("balanced_acc", logits, labels) == pytest.approx(np.mean(recalls))
    only = torch.zeros(len(logits), 2, dtype=torch.float64)
    assert math.isnan(value("auroc", only, torch.zeros(len(logits), dtype=torch.int64)))
    assert value("auroc", without, labels - (labels > 2).long()) > 0.5
    assert 0.5 < value("auroc", logits, labels) < 1


def test_any_number_is_better_than_nan():
    assert is_better("auroc", 0.1, math.nan) and not is_better("auroc", math.nan, 0.1)
    assert not is_better("loss", math.nan, math.nan)
    assert is_better("loss", 1.0, 2.0) and is_better("acc", 0.2, 0.1)


@pytest.mark.parametrize(("hits", "total"), [(0, 5), (5, 5), (3, 8), (950, 1000), (1, 1)])
def test_wilsons_interval_is_scipys(hits, total):
    ours = wilson_interval(hits, total, z=1.959963984540054)
    wanted = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    assert ours == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_an_evaluation_gives_what_was_asked_for_and_its_logits():
    torch.manual_seed(0)
    network, split = Network().eval(), make_split(513)
    names = list(METRICS)
    scores, logits = evaluate(Alone(), network, split, prepare, metrics=names, with_logits=True)
    assert list(scores) == names and logits.shape == (513, 3)
    with torch.inference_mode():
        plain = network(prepare(split.stored[split.rows]))
    torch.testing.assert_close(logits, plain)
    for name in names:
        assert scores[name] == pytest.approx(value(name, logits.double(), split.labels), rel=1e-5)
    assert evaluate(Alone(), network, split, prepare) == {k: scores[k] for k in ("loss", "acc")}


ASKED = {"metrics": "balanced_acc,auroc,top5", "select_by": "macro_f1", "val_fraction": 0.3}


@pytest.mark.slow
def test_a_run_logs_them_and_chooses_by_one(tmp_path, capsys):
    folder, _ = smallruns.train(tmp_path, epochs=3, ema_decay=0, **ASKED)
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in ("balanced_acc", "auroc", "top5", "macro_f1"))
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "val/macro_f1" in r]
    assert len(records) == 3
    for record in records:
        assert {"val/loss", "val/acc", "val/balanced_acc", "val/auroc"} < record.keys()
        assert "val/ap" not in record
    summary = json.loads((folder / "summary.json").read_text())
    best = max(records, key=lambda record: record["val/macro_f1"])
    assert summary["best_epoch"] == best["epoch"]
    assert summary["scores"]["val/macro_f1"] == best["val/macro_f1"]
    assert "test/macro_f1" in summary["scores"]


@pytest.mark.slow
def test_two_processes_say_the_same_as_one(tmp_path):
    """Also where a process has no batch of the evaluation: 100 images are one."""
    names = ["loss", "acc", "balanced_acc", "auroc", "ece"]
    flags = {"epochs": 1, "metrics": ",".join(names), "mixed_precision": "no", "mix_prob": 0}
    flags |= {"model": "test_vit", "image_size": 32, "dropout": None}  # without BatchNorm
    found = []
    for processes in (1, 2):
        folder = faulty.start(tmp_path / str(processes), processes=processes, **flags).done()
        found.append(json.loads((folder / "summary.json").read_text())["scores"])
        assert {f"test/{name}" for name in names} < {*found[-1]}
    # Gradients add up in another order
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_there_is_no_best_epoch_without_validation_images(tmp_path):
    with pytest.raises(UserError, match=r"--select_by auroc chooses .* --val_fraction 0.1 holds"):
        smallruns.train(tmp_path, select_by="auroc")


def test_a_mistyped_metric_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        smallruns.build_parser("train.py").read(["--metrics=acc,balanced_ac"])
    assert '"balanced_ac" is not one of loss, acc' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        smallruns.build_parser("train.py").read(["--select_by=accuracy"])

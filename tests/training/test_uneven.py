"""--imbalance in runs: what it does to the loss and the order, resumed and on two processes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import faulty
import smallruns
from harness.data.batches import row_order
from harness.data.pixels import epoch_order
from harness.errors import UserError
from harness.training.imbalance import make_loss
from harness.training.metrics_file import read_metrics
from tricks.label_smoothing import smooth_labels, soft_cross_entropy

LABELS = torch.tensor([0] * 60 + [1] * 20 + [2] * 6)[torch.randperm(86)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Digits 0, 1 and 2 as a folder: 60, 20 and 6 to train on, 20 each to test."""
    root, digits = tmp_path_factory.mktemp("uneven"), load_digits()
    for digit, count in enumerate((60, 20, 6)):
        rows = (digits.target == digit).nonzero()[0]
        for split, some in (("train", rows[:count]), ("test", rows[count : count + 20])):
            (root / split / str(digit)).mkdir(parents=True)
            for row in some:
                pixels = (digits.images[row] * 15).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / str(digit) / f"{row}.png")
    return root


def test_orders_are_functions_of_the_seed_the_epoch_and_the_kind():
    assert torch.equal(row_order(LABELS, 1, 2), epoch_order(86, 1, 2))
    for kind, most in (("balanced", 29), ("sqrt", 44)):
        order = row_order(LABELS, 1, 2, kind)
        assert torch.equal(order, row_order(LABELS, 1, 2, kind)) and len(order) == 86
        assert LABELS[order].bincount()[0] == pytest.approx(most, abs=1)
        assert not torch.equal(order, row_order(LABELS, 1, 3, kind))
    assert torch.equal(row_order(LABELS, 1, 2, "class_weights"), epoch_order(86, 1, 2))


def options(kind, tau):
    return SimpleNamespace(imbalance=kind, imbalance_tau=tau)


def test_losses():
    logits, targets = torch.randn(5, 3), torch.rand(5, 3).softmax(1)
    for kind in ("none", "balanced", "sqrt"):
        assert make_loss(options(kind, 1.0), LABELS.numpy(), 3, "cpu") == (soft_cross_entropy, None)
    counts = torch.tensor([60.0, 20, 6])
    adjusted, shares = make_loss(options("logit_adjustment", 0.5), LABELS.numpy(), 3, "cpu")
    expected = soft_cross_entropy(logits + 0.5 * (counts / 86).log(), targets)
    torch.testing.assert_close(adjusted(logits, targets), expected)
    torch.testing.assert_close(shares, counts / 86)
    weighed, shares = make_loss(options("class_weights", 1.0), LABELS.numpy(), 3, "cpu")
    expected = -(targets * (86 / 3 / counts) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(weighed(logits, targets), expected)
    torch.testing.assert_close(shares, counts / 86)


@pytest.mark.parametrize("kind", ["logit_adjustment", "class_weights"])
def test_smoothing_does_not_favour_rare_classes(kind):
    """What knows nothing but the frequencies answers all classes alike, smoothed or not."""
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    for smoothing in (0.0, 0.2):
        loss_of, shares = make_loss(options(kind, 1.0), labels.numpy(), 3, "cpu")
        bias = torch.zeros(3, requires_grad=True)
        targets = smooth_labels(torch.nn.functional.one_hot(labels, 3).float(), smoothing, shares)
        optimizer = torch.optim.LBFGS([bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure(bias=bias, targets=targets, optimizer=optimizer, loss_of=loss_of):
            optimizer.zero_grad()
            loss = loss_of(bias.expand(1000, 3), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
        torch.testing.assert_close(
            bias.detach().softmax(0), torch.full((3,), 1 / 3), atol=2e-3, rtol=0
        )


PLAIN = {"max_train_samples": None, "batch_size": 24, "epochs": 4, "logging_steps": 1}


def losses(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return [r["train/loss"] for r in records if "train/loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["logit_adjustment", "class_weights", "balanced", "sqrt"])
def test_a_run_resumes_bit_for_bit(uneven, tmp_path, kind, capsys):
    flags = {**PLAIN, "dataset": uneven, "imbalance": kind}
    whole, _ = smallruns.train(tmp_path / "whole", **flags)
    said = capsys.readouterr().out
    assert "uneven" in said and "--imbalance logit_adjustment" not in said
    smallruns.train(tmp_path / "parts", stop_after=5, **flags)
    parts, _ = smallruns.train(tmp_path / "parts", resume_from_checkpoint="auto", **flags)
    assert smallruns.digest(parts) == smallruns.digest(whole)
    plain, _ = smallruns.train(tmp_path / "plain", **flags | {"imbalance": "none"})
    assert "--imbalance logit_adjustment makes" in capsys.readouterr().out
    assert losses(plain) != losses(whole)


@pytest.mark.slow
def test_a_balanced_order_is_the_same_on_two_processes(uneven, tmp_path):
    flags = {**PLAIN, "dataset": uneven, "imbalance": "balanced", "mixed_precision": "no"}
    flags |= {"model": "squeezenet1_1", "image_size": 32, "dropout": 0, "lr": 0.02, "mix_prob": 0}
    two = faulty.start(tmp_path / "two", processes=2, stop_after=5, **flags)
    one, _ = smallruns.train(tmp_path / "one", stop_after=5, **flags)
    assert losses(two.done()) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.slow
def test_two_processes_resume_a_balanced_order_bit_for_bit(uneven, tmp_path):
    flags = {**PLAIN, "dataset": uneven, "imbalance": "balanced"}
    whole = faulty.start(tmp_path / "whole", processes=2, **flags)
    faulty.start(tmp_path / "parts", processes=2, stop_after=5, **flags).done()
    parts = faulty.start(
        tmp_path / "parts", processes=2, resume_from_checkpoint="auto", **flags
    ).done()
    assert smallruns.digest(parts) == smallruns.digest(whole.done())


@pytest.mark.slow
def test_stages_have_one_each_and_kept_features_too(uneven, tmp_path):
    """Decoupled training: the whole network as the images come, then the head, balanced."""
    stages = """[
        {epochs: 2, train: {head: 0.1}, imbalance: balanced},
        {epochs: 1, train: {all: 0.01}, imbalance: logit_adjustment, imbalance_tau: 0.5}]"""
    flags = {**PLAIN, "dataset": uneven, "epochs": None, "stages": stages, "mix_prob": 0}
    folder, _ = smallruns.finetune(tmp_path / "stages", **flags)
    other, _ = smallruns.finetune(
        tmp_path / "plain", **flags | {"stages": stages.replace(", imbalance: balanced", "")}
    )
    assert losses(folder)[0] != losses(other)[0]
    assert losses(folder)[-1] != losses(other)[-1]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"imbalance_tau": 2}, "--imbalance_tau has no effect with --imbalance none"),
        ({"imbalance_tau": 2, "imbalance": "sqrt"}, "no effect with --imbalance sqrt"),
        ({"imbalance": "balanced", "shard_store": True}, "each machine has only a share"),
    ],
)
def test_flags_that_cannot_be_had_together(uneven, tmp_path, flags, line):
    with pytest.raises(UserError, match=line):
        smallruns.train(tmp_path, **PLAIN, dataset=uneven, **flags)

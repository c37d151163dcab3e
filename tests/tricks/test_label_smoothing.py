"""Smoothed targets and the soft cross-entropy, against torch's own."""

import math

import pytest
import torch
from torch.nn import functional as F

from tricks.label_smoothing import smooth_labels, soft_cross_entropy


def make_logits(n=5, classes=7, dtype=torch.float32):
    logits = torch.randn(n, classes, generator=torch.Generator().manual_seed(0)) * 3
    return logits.to(dtype).requires_grad_(), torch.arange(n) % classes


def test_table():
    targets = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0]])
    expected = torch.tensor([[0.925, 0.025, 0.025, 0.025], [0.475, 0.25, 0.25, 0.025]])
    torch.testing.assert_close(smooth_labels(targets, 0.1), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [1, 5])
def test_rows_stay_distributions_and_inputs_stay_themselves(smoothing, n):
    targets = torch.rand(n, 7, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    original = targets.clone()
    smoothed = smooth_labels(targets, smoothing)
    torch.testing.assert_close(smoothed.sum(dim=1), torch.ones(n))
    assert smoothed.min() >= smoothing / 7
    assert torch.equal(targets, original)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_loss_and_gradient_equal_torchs(smoothing):
    logits, labels = make_logits()
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    (expected_grad,) = torch.autograd.grad(expected, logits)

    loss = soft_cross_entropy(logits, smooth_labels(F.one_hot(labels, 7).float(), smoothing))
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_loss_equals_timms():
    losses = pytest.importorskip("timm.loss", reason="parity with timm")
    logits, labels = make_logits()
    targets = smooth_labels(F.one_hot(labels, 7).float(), 0.1)
    torch.testing.assert_close(
        soft_cross_entropy(logits, targets), losses.SoftTargetCrossEntropy()(logits, targets)
    )
    torch.testing.assert_close(
        soft_cross_entropy(logits, targets), losses.LabelSmoothingCrossEntropy(0.1)(logits, labels)
    )


def test_smoothing_and_mixing_commute():
    first, second = torch.eye(7)[[0, 1]], torch.eye(7)[[2, 3]]
    mixed_first = smooth_labels(torch.lerp(second, first, 0.3), 0.1)
    smoothed_first = torch.lerp(smooth_labels(second, 0.1), smooth_labels(first, 0.1), 0.3)
    torch.testing.assert_close(mixed_first, smoothed_first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_lose_nothing(dtype):
    logits, labels = make_logits(dtype=dtype)
    loss = soft_cross_entropy(logits, F.one_hot(labels, 7).float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels))


@pytest.mark.parametrize("targets_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_double_logits_give_a_double_loss(targets_dtype):
    logits, labels = make_logits(dtype=torch.float64)
    logits = (logits.detach() + 1e-10 * labels.view(-1, 1)).requires_grad_()  # float32 loses it
    targets = F.one_hot(labels, 7).to(targets_dtype)
    loss = soft_cross_entropy(logits, targets)
    assert loss.dtype == torch.float64
    by_hand = -logits.log_softmax(1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-14, atol=0)
    assert torch.autograd.grad(loss, logits)[0].dtype == torch.float64


def test_double_targets_do_not_raise_the_precision():
    logits, labels = make_logits()
    one_hot = F.one_hot(labels, 7)
    loss = soft_cross_entropy(logits, one_hot.double())
    assert loss.dtype == torch.float32 and loss == soft_cross_entropy(logits, one_hot.float())


def test_gradients_are_those_of_the_formula_bit_for_bit():
    """So that runs of earlier versions go on as they would have."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(126, 10, generator=generator).requires_grad_()
        targets = torch.rand(126, 10, generator=generator).softmax(1)
        formula = -(targets * logits.log_softmax(1)).sum(1).mean()
        (expected,) = torch.autograd.grad(formula, logits)
        loss = soft_cross_entropy(logits, targets)
        assert torch.equal(torch.autograd.grad(loss, logits)[0], expected)
        torch.testing.assert_close(loss, formula, rtol=3e-7, atol=0)


def test_autocast_changes_nothing():
    logits, labels = make_logits()
    targets = F.one_hot(labels, 7).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = soft_cross_entropy(logits, targets)
    assert torch.equal(inside, soft_cross_entropy(logits, targets))


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    loss = soft_cross_entropy(logits, torch.tensor([[0.0, 1.0, 0.0]]))
    assert loss.item() == pytest.approx(2e4)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, math.nan])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match=str(smoothing)):
        smooth_labels(torch.eye(3), smoothing)


def test_class_indices_are_refused():
    with pytest.raises(ValueError, match="int64"):
        smooth_labels(torch.arange(3), 0.1)
    with pytest.raises(ValueError, match=r"\(5, 7\) and \(5,\)"):
        soft_cross_entropy(torch.zeros(5, 7), torch.arange(5))

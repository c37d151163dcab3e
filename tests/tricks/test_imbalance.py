"""Tricks for uneven classes: logit adjustment, class weights, balanced orders."""

import inspect
import time

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from tricks import balanced_sampling, class_weights, logit_adjustment
from tricks.balanced_sampling import class_shares, weighted_order
from tricks.class_weights import (
    effective_number_weights,
    inverse_frequency_weights,
    weighted_cross_entropy,
)
from tricks.logit_adjustment import add_priors, log_priors, remove_priors

COUNTS = torch.tensor([600, 40, 7, 1])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made_labels(counts=COUNTS, seed=3):
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    return labels[torch.randperm(len(labels), generator=generator(seed))]


# --- logit adjustment ---


def test_priors_are_the_classes_frequencies_and_never_nothing():
    torch.testing.assert_close(log_priors(COUNTS).exp(), COUNTS / 648)
    priors = log_priors(torch.tensor([9, 0]))
    torch.testing.assert_close(priors.exp(), torch.tensor([0.9, 0.1]))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_adding_and_removing_are_inverse_and_shift_the_odds_by_tau(tau):
    logits = torch.randn(5, 4, generator=generator())
    priors = log_priors(COUNTS)
    torch.testing.assert_close(remove_priors(add_priors(logits, priors, tau), priors, tau), logits)
    odds = add_priors(logits, priors, tau).softmax(1) / logits.softmax(1)
    torch.testing.assert_close(odds[:, 0] / odds[:, 1], torch.full((5,), 15.0**tau))


def test_a_linear_model_trained_on_adjusted_logits_answers_as_if_classes_were_even():
    """Two Gaussians, 50 to 1: the boundary of equal classes is half-way, that of plain training
    log 50 / distance further."""
    draw = generator(1)
    labels = (torch.arange(20_400) >= 20_000).long()
    x = torch.randn(len(labels), generator=draw) + 2.0 * labels
    inputs, priors = torch.stack([x, torch.ones_like(x)], 1), log_priors(labels.bincount())
    boundaries = {}
    for tau in (0.0, 1.0):
        weight = torch.zeros(2, 2, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

        def closure(tau=tau, weight=weight, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(add_priors(inputs @ weight, priors, tau), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        slope, offset = (weight[:, 1] - weight[:, 0]).tolist()
        boundaries[tau] = -offset / slope
    assert boundaries[1.0] == pytest.approx(1.0, abs=0.1)
    assert boundaries[0.0] == pytest.approx(1.0 + np.log(50) / 2, abs=0.1)


# --- class weights ---


def test_inverse_frequency_is_scikit_learns_balanced():
    labels = made_labels().numpy()
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    weights = inverse_frequency_weights(COUNTS)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_effective_numbers_go_from_none_to_inverse_frequency():
    torch.testing.assert_close(effective_number_weights(COUNTS, 0.0), torch.ones(4))
    near = effective_number_weights(COUNTS, 1 - 1e-9)
    torch.testing.assert_close(near, inverse_frequency_weights(COUNTS), rtol=1e-5, atol=0)
    paper = (1 - 0.99) / (1 - 0.99 ** COUNTS.double())  # Cui et al., formula 12, up to scale
    weights = effective_number_weights(COUNTS, 0.99)
    torch.testing.assert_close(weights / weights[0], (paper / paper[0]).float())


@pytest.mark.parametrize("weigh", [inverse_frequency_weights, effective_number_weights])
def test_the_mean_image_weighs_one_and_a_class_without_images_nothing(weigh):
    for counts in (COUNTS, torch.tensor([5, 0, 2])):
        weights = weigh(counts)
        assert (weights * counts).sum() / counts.sum() == pytest.approx(1, rel=1e-6)
        assert torch.equal(weights == 0, counts == 0)


def test_the_weighted_loss_is_torchs_and_adds_up_over_parts():
    logits = torch.randn(6, 4, generator=generator(), requires_grad=True)
    labels, weights = torch.tensor([0, 1, 2, 3, 0, 0]), inverse_frequency_weights(COUNTS)
    hard = F.one_hot(labels, 4).float()
    loss = weighted_cross_entropy(logits, hard, weights)
    by_index = F.cross_entropy(logits, labels, weight=weights, reduction="none").mean()
    torch.testing.assert_close(loss, by_index)
    soft = (hard + hard.roll(1, 0)) / 2
    torch.testing.assert_close(
        weighted_cross_entropy(logits, soft, weights),
        -(weights * soft * logits.log_softmax(1)).sum(1).mean(),
    )
    halves = [weighted_cross_entropy(logits[k::2], soft[k::2], weights) for k in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, weighted_cross_entropy(logits, soft, weights))
    assert weighted_cross_entropy(logits.bfloat16(), soft, weights).dtype == torch.float32


# --- balanced orders ---


@pytest.mark.parametrize("power", [0.0, 0.5, 0.8, 1.0])
def test_classes_come_as_often_as_asked_and_rows_as_evenly_as_can_be(power):
    labels, shares = made_labels(), class_shares(COUNTS, power)
    for seed in range(5):
        order = weighted_order(labels, shares, generator(seed))
        assert order.dtype == torch.int64 and len(order) == len(labels)
        counts = labels[order].bincount(minlength=4)
        assert (counts - len(labels) * shares).abs().max() < 1
        used = order.bincount(minlength=len(labels))
        for k in range(4):
            of_class = used[labels == k]
            assert of_class.max() - of_class.min() <= 1
    if power == 1:
        assert torch.equal(order.sort().values, torch.arange(len(labels)))


def test_over_many_epochs_shares_are_met_on_average_and_every_row_is_used():
    labels = made_labels(torch.tensor([90, 7, 3]))
    shares = torch.tensor([0.313, 0.333, 0.354])
    orders = [weighted_order(labels, shares, generator(seed)) for seed in range(2000)]
    counts = torch.stack([labels[order].bincount(minlength=3) for order in orders]).double()
    torch.testing.assert_close(counts.mean(0), shares.double() * 100, atol=0.05, rtol=0)
    used = torch.stack([order.bincount(minlength=100) for order in orders]).double().mean(0)
    assert used[labels == 0].std() < 0.03  # of 0.35: no row of the frequent class is favoured


def test_the_same_generator_gives_the_same_order_and_another_another():
    labels, shares = made_labels(), class_shares(COUNTS)
    first, again = (weighted_order(labels, shares, generator(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, weighted_order(labels, shares, generator(8)))


def test_a_class_without_a_share_or_without_rows_does_not_come():
    labels = torch.tensor([0, 0, 2, 2, 2])
    for seed in range(50):
        order = weighted_order(labels, torch.tensor([0.3, 0.0, 0.7]), generator(seed))
        assert set(labels[order].tolist()) == {0, 2}
        alone = weighted_order(labels, torch.tensor([1.0, 0, 0]), generator(seed))
        assert set(labels[alone].tolist()) == {0}
    assert class_shares(torch.tensor([4, 0]), 0.0).tolist() == [1.0, 0.0]


@pytest.mark.slow
def test_a_million_images_of_a_thousand_classes_take_a_second():
    counts = (1300 * 0.99 ** torch.arange(1000)).long().clamp(min=2)
    counts[0] += 1_300_000 - counts.sum()
    labels = made_labels(counts)
    start = time.perf_counter()
    order = weighted_order(labels, class_shares(counts), generator())
    assert time.perf_counter() - start < 5
    assert labels[order].bincount().tolist() == [1300] * 1000


# --- bad input ---


def test_the_check_that_each_file_needs_is_the_same():
    """A trick is copied alone, so each of the three has it."""
    checks = {inspect.getsource(m._check_counts) for m in (
        balanced_sampling, class_weights, logit_adjustment)}  # fmt: skip
    assert len(checks) == 1


@pytest.mark.parametrize(
    "make", [log_priors, inverse_frequency_weights, effective_number_weights, class_shares]
)
@pytest.mark.parametrize(
    "counts",
    [torch.tensor([]), torch.tensor([[1, 2]]), torch.tensor([1.0, 2]), torch.tensor([3, -1]),
     torch.tensor([0, 0])],
)  # fmt: skip
def test_counts_that_are_none(make, counts):
    with pytest.raises(ValueError, match=r"^counts must be"):
        make(counts)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: add_priors(torch.zeros(2, 3), torch.zeros(2)), "priors \\(classes,\\), got"),
        (lambda: add_priors(torch.zeros(2, 3), torch.zeros(3), -1), "tau must be finite and at"),
        (lambda: remove_priors(torch.zeros(2, 3), torch.zeros(3), float("inf")), "tau must be"),
        (lambda: effective_number_weights(COUNTS, 1.0), r"beta must be in \[0, 1\), got 1.0"),
        (lambda: class_shares(COUNTS, 1.5), r"power must be in \[0, 1\], got 1.5"),
        (lambda: weighted_order(torch.tensor([0, 3]), torch.ones(3), generator()), "labels must"),
        (lambda: weighted_order(torch.tensor([0, 1]), torch.ones(3), generator()),
         "class 2 has a share of 1 and no row"),
        (lambda: weighted_order(torch.tensor([0.0]), torch.ones(1), generator()), "int64"),
        (lambda: weighted_order(torch.tensor([0]), torch.tensor([-1.0]), generator()), "shares"),
        (lambda: weighted_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2)),
         "weights \\(classes,\\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, line):
    with pytest.raises(ValueError, match=line):
        call()

"""Conformal sets: the guarantee by simulation, the scores against plain loops, bad input."""

import math

import pytest
import torch

from tricks.conformal import aps_scores, calibrate_threshold, lac_scores, predict_sets


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(n, classes, rng, sharp=1.5):
    """Probabilities of a network that is badly calibrated, and labels."""
    labels = torch.randint(0, classes, (n,), generator=rng)
    logits = torch.randn(n, classes, generator=rng, dtype=torch.float64)
    logits += 2 * torch.nn.functional.one_hot(labels, classes)
    return (sharp * logits).softmax(1), labels


def test_adaptive_scores_are_those_of_a_plain_loop():
    p, _ = drawn(20, 6, generator())
    u = torch.rand(20, generator=generator(1), dtype=torch.float64)
    for uniforms in (None, u):
        scores = aps_scores(p, uniforms)
        for i in range(20):
            order = p[i].argsort(descending=True, stable=True).tolist()
            for place, k in enumerate(order):
                mass = sum(p[i, j] for j in order[:place])
                mass += 0 if uniforms is None else u[i] * p[i, k]
                assert scores[i, k].item() == pytest.approx(float(mass), abs=1e-12)
    torch.testing.assert_close(lac_scores(p), 1 - p)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("kind", ["threshold", "adaptive", "randomised"])
def test_sets_hold_the_class_as_often_as_promised(kind, alpha):
    """Over draws of calibration and test images: at least 1 - α, and hardly more where exact."""
    rng, held, n, trials = generator(2), [], 60, 400
    for _ in range(trials):
        p, labels = drawn(n + 100, 5, rng)
        uniforms = torch.rand(n + 100, generator=rng, dtype=torch.float64)
        scores = (
            lac_scores(p)
            if kind == "threshold"
            else aps_scores(p, uniforms if kind == "randomised" else None)
        )
        threshold = calibrate_threshold(scores[:n], labels[:n], alpha)
        sets = predict_sets(scores[n:], threshold)
        held.append(sets.gather(1, labels[n:].unsqueeze(1)).double().mean().item())
    mean = sum(held) / trials
    exact = math.ceil((n + 1) * (1 - alpha)) / (n + 1)  # without ties
    error = 4 * (torch.tensor(held).std().item() / math.sqrt(trials))
    assert mean > 1 - alpha - error
    if kind != "adaptive":  # whose lowest score, 0, many images share
        assert mean == pytest.approx(exact, abs=error)


def test_adaptive_sets_are_never_empty_and_grow_on_hard_images():
    p = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25]])
    sets = predict_sets(aps_scores(p), 0.5)
    assert sets.sum(1).tolist() == [1, 2]
    assert predict_sets(aps_scores(p), 0.0).sum(1).tolist() == [1, 1]


def test_the_rank_is_exact_where_floats_are_not():
    scores = torch.arange(19.0).unsqueeze(1)
    labels = torch.zeros(19, dtype=torch.int64)
    assert calibrate_threshold(scores, labels, 0.45) == 10.0  # the 11th: 20 · 0.55
    assert calibrate_threshold(scores, labels, 0.05) == 18.0  # the 19th
    assert calibrate_threshold(scores, labels, 0.049) == math.inf


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: calibrate_threshold(torch.zeros(2, 2), torch.zeros(2).long(), 0), r"in \(0, 1\)"),
        (lambda: calibrate_threshold(torch.zeros(2, 2), torch.tensor([0, 2]), 0.1), "0 to 1, got"),
        (lambda: calibrate_threshold(torch.zeros(2, 2), torch.zeros(2), 0.1), "int64"),
        (lambda: lac_scores(torch.tensor([[0.4, 0.4]])), "row 0 is no distribution"),
        (lambda: lac_scores(torch.tensor([[0.5, float("nan")]])), "NaN"),
        (lambda: aps_scores(torch.tensor([[0.5, 0.5]]), torch.tensor([2.0])), r"in \[0, 1\]"),
        (lambda: predict_sets(torch.zeros(1, 2), float("nan")), "must not be NaN"),
    ],
)
def test_bad_input(call, line):
    with pytest.raises(ValueError, match=line):
        call()

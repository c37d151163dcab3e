"""Scores by hand, scikit-learn and torchmetrics; a temperature that is found again."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tricks.calibration import (
    accuracy,
    brier,
    expected_calibration_error,
    fit_temperature,
    nll,
    reliability_table,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_predictions(samples=501, classes=4, seed=0):
    generator = seeded(seed)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits.softmax(1), labels


def drawn(logits, seed=0):
    """Labels drawn from the logits' own probabilities: calibrated at temperature 1."""
    return torch.multinomial(logits.softmax(1), 1, generator=seeded(seed)).squeeze(1)


TABLE = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.0, 0.0, 1.0], [0.4, 0.4, 0.2]])
LABELS = torch.tensor([0, 0, 2, 1])


# --- scores -------------------------------------------------------------------------------------


def test_scores_table():
    assert accuracy(TABLE, LABELS) == 0.5  # the last is a tie, and the first class counts
    assert nll(TABLE, LABELS) == pytest.approx((math.log(2 * 8) - math.log(0.4)) / 4)
    # .25 + .0625 + .0625; .765625 + .5625 + .015625; 0; .16 + .36 + .04
    assert brier(TABLE, LABELS) == pytest.approx((0.375 + 1.34375 + 0 + 0.56) / 4)


def test_the_ends_of_the_scores():
    right = torch.eye(3)
    labels = torch.arange(3)
    assert (accuracy(right, labels), nll(right, labels), brier(right, labels)) == (1, 0, 0)
    assert expected_calibration_error(right, labels) == 0
    wrong = labels.roll(1)
    assert (accuracy(right, wrong), nll(right, wrong), brier(right, wrong)) == (0, math.inf, 2)
    assert expected_calibration_error(right, wrong) == 1


def test_scores_equal_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    probabilities, labels = some_predictions()
    assert nll(probabilities, labels) == pytest.approx(metrics.log_loss(labels, probabilities))
    one_hot = F.one_hot(labels, 4)
    squared = metrics.mean_squared_error(one_hot, probabilities)
    assert brier(probabilities, labels) == pytest.approx(4 * squared)
    assert accuracy(probabilities, labels) == metrics.accuracy_score(
        labels, probabilities.argmax(1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_of_any_precision(dtype):
    probabilities, labels = some_predictions()
    rounded = probabilities.to(dtype)
    before = rounded.clone()
    assert brier(rounded, labels) == pytest.approx(brier(probabilities, labels), abs=1e-2)
    assert torch.equal(rounded, before)


# --- reliability --------------------------------------------------------------------------------


def test_reliability_table_by_hand():
    # Bins (0, .25], (.25, .5], (.5, .75], (.75, 1]: an edge belongs to the bin below it.
    probabilities = torch.tensor(
        [[0.25] * 4, [0.5, 0.5, 0, 0], [0.3, 0.3, 0.4, 0], [0, 0, 0, 1.0], [0.05, 0.85, 0.1, 0]]
    )
    table = reliability_table(probabilities, torch.tensor([0, 1, 2, 3, 0]), bins=4)
    assert table.counts.tolist() == [1, 2, 0, 2]
    assert table.accuracy.tolist() == [1.0, 0.5, 0.0, 0.5]
    assert table.confidence.tolist() == pytest.approx([0.25, 0.45, 0.0, 0.925])
    ece = expected_calibration_error(probabilities, torch.tensor([0, 1, 2, 3, 0]), bins=4)
    assert ece == pytest.approx((1 * 0.75 + 2 * 0.05 + 2 * 0.425) / 5)


def test_an_edge_is_one_in_either_precision():
    """0.6 in float32 is a little above 0.6."""
    probabilities, labels = (
        torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.4, 0.6]]),
        torch.tensor([0] * 3),
    )
    for dtype in (torch.float32, torch.float64):
        exact = (probabilities.double() * 10).round() / 10
        table = reliability_table(exact.to(dtype), labels, bins=5)
        assert table.counts.tolist() == [0, 0, 2, 1, 0], dtype


def test_one_bin_compares_the_means():
    probabilities, labels = some_predictions()
    gap = abs(accuracy(probabilities, labels) - probabilities.amax(1).mean().item())
    assert expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(gap)
    assert reliability_table(probabilities, labels, 1).counts.tolist() == [501]


@pytest.mark.parametrize("bins", [1, 7, 15, 100])
def test_a_table_holds_every_sample_once_and_its_accuracy(bins):
    probabilities, labels = some_predictions()
    table = reliability_table(probabilities, labels, bins)
    assert [len(column) for column in table] == [bins] * 3
    assert table.counts.sum() == 501
    right = (table.counts * table.accuracy).sum().item() / 501
    assert right == pytest.approx(accuracy(probabilities, labels))
    filled = table.counts > 0
    upper = torch.arange(1, bins + 1) / bins
    assert (table.confidence <= upper + 1e-9)[filled].all()
    assert (table.confidence > upper - 1 / bins - 1e-9)[filled].all()


def test_the_calibration_error_equals_a_slow_loop():
    probabilities, labels = some_predictions()
    gaps = 0.0
    for k in range(15):
        inside = [
            (max(row), row.index(max(row)) == label)
            for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
            if k / 15 < max(row) <= (k + 1) / 15
        ]
        gaps += abs(sum(confidence - right for confidence, right in inside))
    ours = expected_calibration_error(probabilities, labels)
    assert ours == pytest.approx(gaps / 501, abs=1e-12) and ours > 0


def test_the_calibration_error_equals_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    probabilities, labels = some_predictions()
    theirs = classification.MulticlassCalibrationError(4, n_bins=15)(probabilities, labels)
    ours = expected_calibration_error(probabilities, labels)
    assert ours == pytest.approx(theirs.item(), abs=1e-6)


class WideCopies(TorchFunctionMode):
    """Counts what is made in float64 as large as all the predictions."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.count += made.numel() >= self.numel
        return made


@pytest.mark.parametrize("score", [accuracy, nll, expected_calibration_error])
def test_predictions_are_not_copied_into_float64(score):
    """The copy and its checks were half of the calibration error's time."""
    probabilities, labels = some_predictions()
    probabilities = probabilities.float()
    with WideCopies(probabilities.numel()) as copies:
        score(probabilities, labels)
    assert copies.count == 0


@pytest.mark.parametrize("bins", [0, -3])
def test_bins_that_are_none(bins):
    with pytest.raises(ValueError, match=str(bins)):
        expected_calibration_error(TABLE, LABELS, bins)


# --- temperature --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.05, 0.3, 1.0, 2.5, 40.0])
def test_a_known_scaling_is_found_again(factor):
    logits = torch.randn(400, 5, generator=seeded(1), dtype=torch.float64)
    labels = drawn(logits)
    base = fit_temperature(logits, labels)
    assert base == pytest.approx(1, abs=0.2)  # calibrated, but for 400 samples' noise
    shift = torch.arange(400).view(-1, 1)
    assert fit_temperature(logits * factor + shift, labels) == pytest.approx(
        base * factor, rel=1e-6
    )


def test_temperature_by_hand():
    # 9 of 10 right with a gap of 5: softmax(5 / T) = .9 where 5 / T = ln 9
    logits = torch.tensor([[5.0, 0.0]] * 10)
    labels = torch.tensor([0] * 9 + [1])
    assert fit_temperature(logits, labels) == pytest.approx(5 / math.log(9), rel=1e-9)


def test_temperature_equals_scipys_and_lowers_the_nll():
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(3):
        logits = torch.randn(300, 6, generator=seeded(seed), dtype=torch.float64)
        labels = drawn(logits, seed)
        logits = logits * 3

        def loss(log_t, logits=logits, labels=labels):
            return F.cross_entropy(logits / math.exp(log_t), labels).item()

        reference = optimize.minimize_scalar(loss, bounds=(-4, 4), options={"xatol": 1e-9})
        ours = fit_temperature(logits, labels)
        assert math.log(ours) == pytest.approx(reference.x, abs=1e-6)
        assert loss(math.log(ours)) < loss(0.0)


@pytest.mark.parametrize("seed", range(12))
def test_no_temperature_in_the_bounds_is_better(seed):
    """Where Newton's steps alone would leave the bounds, too: sure, and often wrong."""
    generator = seeded(seed)
    logits = torch.randn(40, 3, generator=generator, dtype=torch.float64) * 10 ** (seed % 6 - 2)
    some = torch.rand(40, generator=generator) < 0.6
    labels = torch.where(some, logits.argmax(1), torch.randint(3, (40,), generator=generator))
    grid = torch.logspace(-2, 2, 401, dtype=torch.float64).tolist()
    best = min(F.cross_entropy(logits / t, labels).item() for t in grid)
    assert F.cross_entropy(logits / fit_temperature(logits, labels), labels).item() <= best + 1e-12


class SoftmaxCalls(TorchFunctionMode):
    """Counts them: one an evaluation of the NLL's derivatives."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.softmax
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_a_temperature_takes_few_evaluations(factor):
    """Rounding's last step over the solution does not begin the search anew (it took 50)."""
    counts = []
    for seed in range(40):
        logits = torch.randn(300, 5, generator=seeded(seed), dtype=torch.float64)
        labels = drawn(logits, seed)
        with SoftmaxCalls() as calls:
            fit_temperature(logits * factor, labels)
        counts.append(calls.count)
    assert min(counts) >= 3 and sorted(counts)[20] <= 12 and max(counts) <= 20, counts


def test_the_bounds_of_a_temperature():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == 0.01  # all right
    assert fit_temperature(logits, torch.tensor([1, 0])) == 100.0  # all wrong
    assert fit_temperature(logits * 1e4, torch.tensor([0, 1])) == 0.01
    assert fit_temperature(torch.full((3, 4), 0.1), torch.tensor([0, 1, 2])) == 1.0


def test_far_and_half_precision_logits():
    logits = torch.randn(200, 3, generator=seeded())
    labels = drawn(logits)
    hot = fit_temperature(logits * 1000, labels)
    assert hot == 100.0
    half = fit_temperature(logits.bfloat16(), labels)
    assert half == pytest.approx(fit_temperature(logits, labels), rel=0.02)


def test_a_temperature_changes_no_class():
    probabilities, labels = some_predictions()
    logits = probabilities.log()
    scaled = (logits / fit_temperature(logits, labels)).softmax(1)
    assert torch.equal(scaled.argmax(1), probabilities.argmax(1))
    assert nll(scaled, labels) <= nll(probabilities, labels)


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [accuracy, nll, brier, expected_calibration_error])
def test_logits_are_no_probabilities(score):
    logits = torch.tensor([[0.5, 0.5], [3.0, -2.0]])
    with pytest.raises(ValueError, match="row 1 is no distribution: from -2, with the sum 1"):
        score(logits, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"row 0.*sum 0\.5"):
        score(torch.full((2, 2), 0.25), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"row 0.*nan"):
        score(torch.full((2, 2), math.nan), torch.tensor([0, 1]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_temperature_of_what_is_not_finite(value):
    logits = torch.zeros(3, 2)
    logits[1, 0] = value
    with pytest.raises(ValueError, match="1 samples"):
        fit_temperature(logits, torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("function", [nll, reliability_table, fit_temperature])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), r"\(4,\).*\(2,\)"),
        (torch.zeros(4), "float32"),
        (torch.tensor([0, 1, 2, 3]), "0 to 2, got 0 to 3"),
        (torch.tensor([0, 1, 2, -1]), "got -1 to 2"),
    ],
)
def test_labels_that_do_not_fit(function, labels, message):
    with pytest.raises(ValueError, match=message):
        function(TABLE, labels)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (4, 0), (1, 4, 3)])
def test_predictions_of_another_shape(shape):
    with pytest.raises(ValueError, match="samples, classes"):
        nll(torch.zeros(shape), LABELS)

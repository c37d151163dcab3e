"""Averages, votes, weights and selection: tables by hand, and optima known or found by scipy."""

import math

import pytest
import torch

from tricks.calibration import nll
from tricks.ensemble import (
    average_logits,
    average_probabilities,
    crossfit,
    fit_weights,
    greedy_selection,
    majority_vote,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logs(*members):
    """Logits of members' probabilities; the shift, another in each row, must not matter."""
    logits = torch.tensor(members, dtype=torch.float64).log()
    return logits + torch.arange(logits[..., 0].numel()).view(*logits.shape[:2], 1)


def some_logits(members=4, samples=61, classes=5, seed=0):
    """Members of unlike quality, and labels."""
    generator = seeded(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    noise = torch.randn(members, samples, classes, generator=generator)
    hint = torch.eye(classes)[labels] * torch.linspace(0.3, 2, members).view(-1, 1, 1)
    return noise + hint, labels


def close(tensor, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)


A = [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]
B = [[0.2, 0.7, 0.1], [0.1, 0.5, 0.4]]
C = [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]


# --- averages -----------------------------------------------------------------------------------


def test_average_probabilities_table():
    close(average_probabilities(logs(A, B, C)), [[0.3, 0.4, 0.3], [0.2, 1 / 3, 1.4 / 3]])
    close(average_probabilities(logs(A, B), [0.75, 0.25]), [[0.5, 0.4, 0.1], [0.175, 0.275, 0.55]])


@pytest.mark.parametrize("average", [average_probabilities, average_logits])
def test_a_weight_of_zero_is_an_absence(average):
    three, two = logs(A, B, C), logs(A, B, C)[[0, 2]]
    torch.testing.assert_close(average(three, [0.5, 0, 0.5]), average(two))
    assert torch.equal(average(three, [0, 1, 0]), average(three[1:2]))


def test_one_member_is_itself():
    logits, _ = some_logits(members=1)
    torch.testing.assert_close(average_probabilities(logits)[0], logits[0, 0].double().softmax(0))
    assert torch.equal(average_logits(logits), logits[0].double())
    labels, shares, ties = majority_vote(logits)
    assert torch.equal(labels, logits[0].argmax(1)) and ties == 0
    assert torch.equal(shares.argmax(1), labels) and set(shares.unique().tolist()) == {0.0, 1.0}


def test_average_logits_table_and_the_geometric_mean():
    logits = torch.tensor([[[1.0, -2.0]], [[4.0, 6.0]]])
    close(average_logits(logits), [[2.5, 2.0]])
    close(average_logits(logits, [0.25, 0.75]), [[3.25, 4.0]])
    # √(.9 · .1) = .3 and √(.1 · .4) = .2
    geometric = average_logits(logs([[0.9, 0.1]], [[0.1, 0.4]])).softmax(1)
    close(geometric, [[0.6, 0.4]])


def test_far_logits_stay_probabilities():
    logits = torch.tensor([[[5000.0, 0.0]], [[0.0, -5000.0]]], dtype=torch.float16)
    close(average_probabilities(logits.float()), [[1.0, 0.0]])
    assert average_probabilities(logits).dtype == torch.float64


def test_inputs_are_left_alone():
    logits, labels = some_logits()
    before = logits.clone()
    average_probabilities(logits)
    average_logits(logits)
    majority_vote(logits)
    fit_weights(logits, labels)
    greedy_selection(logits, labels)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], "3 members.*0.5, 0.5"),
        ([0.5, 0.6, -0.1], "-0.1"),
        ([0.5, 0.5, 0.5], "sum 1"),
        ([0.0, 0.0, 0.0], "sum 1"),
        ([math.nan, 0.5, 0.5], "nan"),
        ([math.inf, 0.5, 0.5], "inf"),
        ([[0.5, 0.25, 0.25]], "3 members"),
    ],
)
@pytest.mark.parametrize("average", [average_probabilities, average_logits])
def test_weights_off_the_simplex(average, weights, message):
    with pytest.raises(ValueError, match=message):
        average(logs(A, B, C), weights)


def test_thirds_in_float32_are_weights():
    weights = torch.tensor([1 / 3] * 3)
    probabilities = average_probabilities(logs(A, B, C), weights)
    close(probabilities.sum(1), [1.0, 1.0])


LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "function",
    [
        average_probabilities,
        average_logits,
        majority_vote,
        lambda logits: fit_weights(logits, LABELS),
        lambda logits: greedy_selection(logits, LABELS),
    ],
)
def test_the_member_with_bad_logits_is_named(function, value):
    logits = logs(A, B, C)
    logits[1, 0, 2] = value
    with pytest.raises(ValueError, match="member 1 are not finite for 1 of 2 samples"):
        function(logits)


@pytest.mark.parametrize("shape", [(3, 2), (0, 2, 3), (3, 0, 3), (3, 2, 0), (1, 1, 2, 3)])
def test_logits_of_another_shape(shape):
    with pytest.raises(ValueError, match="members, samples, classes"):
        average_probabilities(torch.zeros(shape))
    with pytest.raises(ValueError, match="int64"):
        majority_vote(torch.zeros(2, 2, 3, dtype=torch.int64))


# --- votes --------------------------------------------------------------------------------------


def test_majority_vote_table():
    a = [[0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.0001, 0.0001, 0.9998]]
    b = [[0.5, 0.4, 0.1], [0.1, 0.6, 0.3], [0.1, 0.9, 0.0], [0.4, 0.35, 0.25]]
    c = [[0.0, 1.0, 0.0], [0.2, 0.3, 0.5], [0.5, 0.3, 0.2], [0.4, 0.35, 0.25]]
    labels, shares, ties = majority_vote(torch.tensor([a, b, c]).add(1e-9).log())
    # Sample 0: two votes to one, though class 1 has the larger sum; 1: all disagree, sums .9,
    # 1.2, .9; 2: class 0 by votes; 3: class 0 by votes, though class 2 has the larger sum.
    assert labels.tolist() == [0, 1, 0, 0]
    assert (shares * 3).round().tolist() == [[2, 1, 0], [1, 1, 1], [2, 1, 0], [2, 0, 1]]
    assert shares.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert ties == 1 and labels.dtype == torch.int64


def test_members_that_disagree_everywhere():
    logits = logs([[0.7, 0.3]] * 3, [[0.1, 0.9], [0.4, 0.6], [0.3, 0.7]])
    labels, shares, ties = majority_vote(logits)
    # sums: .8 to 1.2, 1.1 to .9, and 1 to 1, where the rounding of logarithms decides
    assert labels[:2].tolist() == [1, 0] and ties == 3
    assert (shares == 0.5).all()


def test_a_tie_of_two_is_not_won_by_a_third_with_a_larger_sum():
    members = [[0.40, 0.25, 0.35]], [[0.40, 0.25, 0.35]], [[0.1, 0.46, 0.44]], [[0.1, 0.46, 0.44]]
    labels, shares, ties = majority_vote(logs(*members))
    assert labels.tolist() == [1] and ties == 1  # sums 1.00, 1.42, 1.58
    assert shares.tolist() == [[0.5, 0.5, 0.0]]


def test_the_order_of_members_does_not_matter():
    logits, labels = some_logits()
    order = [2, 0, 3, 1]
    for ours, theirs in zip(
        majority_vote(logits)[:2], majority_vote(logits[order])[:2], strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(average_probabilities(logits), average_probabilities(logits[order]))
    torch.testing.assert_close(
        fit_weights(logits, labels)[order], fit_weights(logits[order], labels)
    )


# --- weights ------------------------------------------------------------------------------------


def test_weights_where_the_optimum_is_known():
    # The label has .8 and .1 in 3 of 5 samples, .1 and .8 in the others; so its average u, and
    # .9 - u: the NLL is least at u = .9 · 3 / 5 = .54 = .1 + .7 w.
    a, b = [0.8, 0.2], [0.1, 0.9]
    logits = logs([a, a, a, b, b], [b, b, b, a, a])
    weights = fit_weights(logits, torch.zeros(5, dtype=torch.int64), tolerance=1e-12)
    close(weights, [0.44 / 0.7, 0.26 / 0.7])


def test_weights_equal_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(3):
        logits, labels = some_logits(seed=seed)
        found = logits.double().softmax(2)[:, torch.arange(len(labels)), labels].numpy()
        reference = optimize.minimize(
            lambda w, found=found: -_mean_log(w @ found),
            [1 / len(found)] * len(found),
            bounds=[(0, 1)] * len(found),
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        weights = fit_weights(logits, labels, tolerance=1e-9)
        reached = nll(average_probabilities(logits, weights), labels)
        assert reached == pytest.approx(reference.fun, abs=1e-8)
        torch.testing.assert_close(weights, torch.tensor(reference.x), rtol=0, atol=1e-3)


def _mean_log(values):
    return torch.from_numpy(values).clamp(min=1e-300).log().mean().item()


def test_weights_lie_on_the_simplex_and_every_round_lowers_the_nll():
    logits, labels = some_logits(members=5, seed=7)
    losses = []
    for rounds in (0, 1, 2, 5, 20, 100):
        weights = fit_weights(logits, labels, tolerance=0, max_rounds=rounds)
        assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1, abs=1e-12)
        losses.append(nll(average_probabilities(logits, weights), labels))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_the_tolerance_is_kept():
    logits, labels = some_logits(members=5, seed=3)
    best = nll(average_probabilities(logits, fit_weights(logits, labels, 1e-11)), labels)
    for tolerance in (1e-1, 1e-2, 1e-4):
        loss = nll(average_probabilities(logits, fit_weights(logits, labels, tolerance)), labels)
        assert best - 1e-12 <= loss <= best + tolerance


def test_weights_of_one_of_equal_and_of_useless_members():
    logits, labels = some_logits()
    assert fit_weights(logits[:1], labels).tolist() == [1.0]
    assert fit_weights(logits[[1, 1, 1]], labels).tolist() == pytest.approx([1 / 3] * 3)
    useless = logits.clone()
    useless[0] = -1000 * torch.eye(5)[labels]  # sure, and always wrong
    weights = fit_weights(useless, labels)
    assert weights[0] < 1e-6 and weights.sum().item() == pytest.approx(1)


def test_weights_with_samples_that_all_find_impossible():
    logits = torch.tensor([[[-2000.0, 0.0], [1.0, 0.0]], [[-2001.0, 0.0], [0.0, 1.0]]])
    weights = fit_weights(logits, torch.tensor([0, 0]))
    assert weights.isfinite().all() and weights[0] > 0.999


# --- greedy selection ---------------------------------------------------------------------------


def test_selection_starts_with_the_best_and_adds_what_helps():
    # Right alone: c 2 of 4, a 3, b 2; a and b together all 4, a and c 3.
    a = [[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]
    b = [[0.6, 0.4], [0.2, 0.8], [0.3, 0.7], [0.9, 0.1]]
    c = [[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]]
    labels = torch.zeros(4, dtype=torch.int64)
    chosen = greedy_selection(logs(c, a, b), labels, max_rounds=1)
    assert chosen == [1, 2]
    averaged = average_probabilities(logs(c, a, b)[chosen])
    assert (averaged.argmax(1) == labels).all()


def test_accuracy_comes_before_nll():
    sure = [[0.99, 0.01], [0.99, 0.01], [0.49, 0.51]]  # a far lower NLL, one mistake
    right = [[0.51, 0.49], [0.51, 0.49], [0.51, 0.49]]
    labels = torch.zeros(3, dtype=torch.int64)
    assert greedy_selection(logs(sure, right), labels, max_rounds=0) == [1]


def test_selection_repeats_a_member_and_stops():
    # All right throughout, so NLL decides. In 11 of 20 samples the label has .9 and .51, in the
    # others .51 and .9. Mean NLL of a: .361, ab .350, aab .345, aaab .345 and a little more. The
    # best weight of a is (.55 · 1.41 - .51) / .39 = .68.
    high, low = [0.9, 0.1], [0.51, 0.49]
    logits = logs([high] * 11 + [low] * 9, [low] * 11 + [high] * 9)
    labels = torch.zeros(20, dtype=torch.int64)
    assert greedy_selection(logits, labels) == [0, 1, 0]


def test_a_gain_that_could_be_roundings_is_none():
    up, down = math.exp(1e-5), math.exp(-1e-5)  # the average of the two gains about 1e-11 nats
    a, b = [[0.9, 0.1], [0.6, 0.4]], [[0.9 * up, 0.1], [0.6 * down, 0.4]]
    logits = torch.tensor([a, b], dtype=torch.float64)
    logits[..., 1] = 1 - logits[..., 0]
    assert len(greedy_selection(logits.log(), LABELS)) == 1


def test_equal_members_stop_at_once_and_the_first_is_taken():
    logits, labels = some_logits()
    assert greedy_selection(logits[[2, 2, 2]], labels) == [0]
    assert greedy_selection(logits[2:3], labels) == [0]


def test_every_addition_improves_and_none_is_left_that_would():
    logits, labels = some_logits(members=5, samples=203, seed=2)
    chosen = greedy_selection(logits, labels)
    assert len(chosen) > 2

    def score(members):
        probabilities = average_probabilities(logits[members])
        right = int((probabilities.argmax(1) == labels).sum())
        return right, -nll(probabilities, labels)

    steps = [score(chosen[:k]) for k in range(1, len(chosen) + 1)]
    assert steps == sorted(steps) and len(set(steps)) == len(steps)
    assert steps[0] == max(score([index]) for index in range(5))
    assert all(score([*chosen, index]) <= (steps[-1][0], steps[-1][1] + 2e-9) for index in range(5))
    assert greedy_selection(logits, labels, max_rounds=1) == chosen[:2]


@pytest.mark.parametrize("fit", [fit_weights, greedy_selection])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2]), r"shape \(2,\), got torch.int64 of \(3,\)"),
        (torch.tensor([0.0, 1.0]), "float32"),
        (torch.tensor([0, 3]), "0 to 2, got 0 to 3"),
        (torch.tensor([-1, 2]), "got -1 to 2"),
    ],
)
def test_labels_that_do_not_fit(fit, labels, message):
    with pytest.raises(ValueError, match=message):
        fit(logs(A, B), labels)


def test_a_negative_number_of_rounds():
    with pytest.raises(ValueError, match="-1"):
        greedy_selection(logs(A, B), LABELS, max_rounds=-1)


# --- cross-fitting ------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, 3, 40, 41])
def test_nobody_is_predicted_by_a_fit_that_saw_it(samples):
    labels = torch.randint(4, (samples,), generator=seeded(1))
    fits = []

    def fit(rows):
        fits.append(rows)
        return set(rows.tolist())

    def predict(seen, rows):
        assert not seen & set(rows.tolist())
        assert seen | set(rows.tolist()) == set(range(samples))
        return torch.stack([rows, rows.flip(0)], dim=1)

    predicted = crossfit(labels, fit, predict, seeded())
    assert predicted[:, 0].tolist() == list(range(samples))
    assert len(fits) == 2 and abs(len(fits[0]) - len(fits[1])) <= 1
    for rows in fits:
        assert rows.tolist() == sorted(rows.tolist())
    one, other = (labels[rows].bincount(minlength=4) for rows in fits)
    assert (one - other).abs().max() <= 1


def test_the_halves_are_the_generators():
    labels = torch.zeros(50, dtype=torch.int64)

    def halves(seed):
        seen = []
        crossfit(labels, lambda rows: seen.append(rows.tolist()), lambda _, r: r, seeded(seed))
        return seen

    assert halves(0) == halves(0) != halves(1)


@pytest.mark.parametrize("samples", [0, 1])
def test_too_few_to_halve(samples):
    with pytest.raises(ValueError, match=str(samples)):
        crossfit(torch.zeros(samples, dtype=torch.int64), len, lambda _, rows: rows)

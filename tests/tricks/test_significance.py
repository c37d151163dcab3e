"""Intervals, tests and correlations: scipy's numbers, and tables by hand."""

import itertools
import math
import time
from fractions import Fraction

import pytest
import torch

from tricks.significance import (
    bootstrap_interval,
    disagreement,
    error_correlation,
    holm,
    mcnemar_exact,
    oracle_accuracy,
    paired_bootstrap_interval,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def right(count, samples):
    return torch.arange(samples) < count


def pair(both, only_a, only_b, neither):
    counts = torch.tensor([both, only_a, only_b, neither])
    a = torch.tensor([1, 1, 0, 0]).repeat_interleave(counts)
    b = torch.tensor([1, 0, 1, 0]).repeat_interleave(counts)
    return a, b


# --- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 9, 360, 10_000])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_an_accuracys_interval_is_the_binomials(samples, share, confidence):
    stats = pytest.importorskip("scipy.stats")
    count = round(samples * share)
    low, high = bootstrap_interval(right(count, samples), confidence)
    binomial = stats.binom(samples, count / samples)
    # A quantile is the first count that has enough below it
    for edge, tail in ((low, (1 - confidence) / 2), (high, (1 + confidence) / 2)):
        k = round(edge * samples)
        assert k / samples == edge
        assert binomial.cdf(k) >= tail - 1e-9 and binomial.cdf(k - 1) < tail + 1e-9


@pytest.mark.parametrize("values", [(1, 1, 0, -1), (0, 0, -1, 1), (1, 0, 1, 0), (-1, -1, 0, 0)])
@pytest.mark.parametrize("confidence", [0.3, 0.375, 0.8, 0.875, 0.97])
def test_a_differences_interval_is_that_of_all_resamples(values, confidence):
    # .375 and .875: of 16 ways for two values, exactly 5 and 11, 1 and 15 reach the quantiles
    n = len(values)
    sums = sorted(sum(draw) for draw in itertools.product(values, repeat=n))
    low, high = (
        sums[math.ceil(len(sums) * tail - 1e-9) - 1] / n
        for tail in ((1 - confidence) / 2, (1 + confidence) / 2)
    )
    assert bootstrap_interval(torch.tensor(values), confidence) == (low, high)


def test_paired_intervals():
    a, b = pair(80, 10, 4, 6)
    low, high = paired_bootstrap_interval(a, b)
    assert low < 0.06 < high
    assert paired_bootstrap_interval(b, a) == (-high, -low)
    assert paired_bootstrap_interval(a.bool(), b.bool()) == (low, high)
    assert paired_bootstrap_interval(a, a) == (0, 0)
    # Shared errors cancel: the same margins, with errors apart, give a wider one
    wide = paired_bootstrap_interval(*pair(74, 16, 10, 0))
    assert wide[0] < low and high < wide[1]


def test_known_distributions_are_free_of_chance():
    before = torch.get_rng_state()
    values = right(30, 37)
    assert bootstrap_interval(values) == bootstrap_interval(values.float(), resamples=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_values_are_resampled():
    values = torch.randn(400, generator=seeded(), dtype=torch.float64) * 3 + 7
    low, high = bootstrap_interval(values, generator=seeded(1))
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.03)
    assert high == pytest.approx(values.mean().item() + half, abs=0.03)
    assert bootstrap_interval(values, generator=seeded(1)) == (low, high)
    assert bootstrap_interval(values, generator=seeded(2)) != (low, high)
    inner = bootstrap_interval(values, confidence=0.5, generator=seeded(1))
    assert low < inner[0] < inner[1] < high
    shifted = paired_bootstrap_interval(values, torch.full((400,), 7.0), generator=seeded(1))
    assert shifted == pytest.approx((low - 7, high - 7))


def test_every_resample_is_drawn():
    # All resamples of one value are that value; 1,500 of them take two blocks, 1 takes one
    for resamples in (1, 1500):
        assert bootstrap_interval(torch.tensor([2.5]), resamples=resamples) == (2.5, 2.5)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(0), {}, r"\(0,\)"),
        (torch.zeros(2, 3), {}, r"\(2, 3\)"),
        (torch.tensor([0.5, math.nan]), {}, "1 of 2"),
        (torch.tensor([math.inf, math.inf]), {}, "2 of 2"),
        (torch.ones(3), {"confidence": 0.0}, "got 0.0"),
        (torch.ones(3), {"confidence": 1.0}, "got 1.0"),
        (torch.ones(3), {"confidence": 95}, "got 95"),
        (torch.ones(3), {"resamples": 0}, "got 0"),
    ],
)
def test_an_interval_of_nothing(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)


def test_pairs_of_unequal_length():
    for test in (paired_bootstrap_interval, mcnemar_exact):
        with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
            test(right(2, 3), right(2, 4))


# --- McNemar ------------------------------------------------------------------------------------


def test_mcnemar_table():
    # 2 · (1 + 12 + 66) / 2¹²
    assert mcnemar_exact(*pair(80, 10, 2, 8)) == (10, 2, 158 / 4096)
    assert mcnemar_exact(*pair(80, 2, 10, 8)) == (2, 10, 158 / 4096)
    assert mcnemar_exact(*pair(5, 0, 0, 5)) == (0, 0, 1.0)
    assert mcnemar_exact(*pair(0, 1, 0, 0)) == (1, 0, 1.0)
    assert mcnemar_exact(*pair(0, 4, 4, 0)) == (4, 4, 1.0)
    assert mcnemar_exact(*pair(0, 0, 20, 0)).p == 2**-19


@pytest.mark.parametrize(
    ("only_a", "only_b"),
    [(1, 0), (3, 9), (7, 8), (40, 41), (200, 150), (1000, 1200), (5000, 5000), (4800, 5200)],
)
def test_mcnemar_equals_scipys(only_a, only_b):
    stats = pytest.importorskip("scipy.stats")
    found = mcnemar_exact(*pair(11, only_a, only_b, 7))
    assert (found.b, found.c) == (only_a, only_b)
    expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert found.p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_is_exact_where_floats_are_not():
    n = 3000
    exact = Fraction(2 * sum(math.comb(n, k) for k in range(1201)), 2**n)
    assert mcnemar_exact(*pair(0, 1200, 1800, 0)).p == float(exact) > 0
    assert mcnemar_exact(*pair(0, 0, 10_000, 0)).p == 0.0  # 2^-9999
    halfway = Fraction(2 * sum(math.comb(77, k) for k in range(19)), 2**77)  # between two floats
    assert mcnemar_exact(*pair(0, 59, 18, 0)).p == float(halfway)


# CPU seconds on two slow cores, with room: 6 and more before
@pytest.mark.parametrize(("only_a", "only_b"), [(29_900, 30_100), (100_000, 101_000)])
def test_mcnemar_of_many_is_exact_and_fast(only_a, only_b):
    began = time.process_time()
    found = mcnemar_exact(*pair(5, only_a, only_b, 5))
    assert time.process_time() - began < 0.8
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert found.p == pytest.approx(expected, rel=1e-8)


def test_mcnemar_of_a_million():
    assert mcnemar_exact(*pair(0, 400_000, 400_000, 0)).p == 1.0
    assert mcnemar_exact(*pair(0, 1_280_000, 0, 0)).p == 0.0


@pytest.mark.slow
def test_the_interval_of_a_million_is_the_normal_ones_and_does_not_take_an_odd_transform():
    n = 1_281_167
    values = right(round(0.76 * n), n)
    shares = torch.full((2 * n + 1,), 1 / (2 * n + 1), dtype=torch.float64)
    seconds = []
    for _ in range(2):  # the first warms up
        start = time.process_time()
        low, high = bootstrap_interval(values)
        middle = time.process_time()
        torch.fft.ifft(torch.fft.fft(shares) ** n)  # most of what it took before
        seconds = [middle - start, time.process_time() - middle]
    assert seconds[0] < seconds[1]
    half = 1.959964 * math.sqrt(0.76 * 0.24 / n)
    assert (low, high) == pytest.approx((0.76 - half, 0.76 + half), abs=2 / n)


def test_resamples_of_many_are_drawn_in_parts_and_the_same():
    values = torch.randn(20_000, generator=seeded())
    draws = torch.randint(20_000, (1500, 20_000), generator=seeded(1))
    means = torch.cat([values.double()[part].mean(1) for part in draws.split(300)])
    expected = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    found = bootstrap_interval(values, resamples=1500, generator=seeded(1))
    assert found == pytest.approx(tuple(expected), rel=1e-12)


# --- several tests ------------------------------------------------------------------------------


def test_holm_table():
    # sorted: .005 · 4, .01 · 3, .03 · 2, .04 · 1, none below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6, 0.5]) == [1.0, 1.0, 1.0]
    assert holm([0.125]) == [0.125] and holm([]) == [] and holm([0.0, 1.0]) == [0.0, 1.0]
    assert holm([0.25, 0.25]) == [0.5, 0.5]


def test_holm_equals_its_step_down_procedure():
    """Hypotheses are rejected in order while p ≤ α / (how many are left): Holm's own words."""
    values = torch.rand(200, 6, generator=seeded(), dtype=torch.float64).square().tolist()
    for p_values in values:
        corrected = holm(p_values)
        for alpha in (0.01, 0.05, 0.2):
            rejected = set()
            while len(rejected) < 6:
                left = [k for k in range(6) if k not in rejected]
                smallest = min(left, key=p_values.__getitem__)
                if p_values[smallest] > alpha / len(left):
                    break
                rejected.add(smallest)
            assert {k for k in range(6) if corrected[k] <= alpha} == rejected


def test_holm_keeps_the_chance_of_any_false_alarm():
    draws = torch.rand(4000, 5, generator=seeded(), dtype=torch.float64)
    alarms = sum(min(holm(row)) <= 0.05 for row in draws.tolist()) / 4000
    assert alarms == pytest.approx(0.05, abs=0.011)  # 3 standard deviations; 0.23 uncorrected


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_what_is_no_p_value(value):
    with pytest.raises(ValueError, match=f"got {value}"):
        holm([0.5, value])


@pytest.mark.parametrize("value", [2, 0.5, -1, math.nan])
def test_correct_is_yes_or_no(value):
    odd = torch.tensor([1.0, value, 0.0])
    for function in (
        lambda: mcnemar_exact(odd, right(1, 3)),
        lambda: error_correlation(odd.view(1, 3)),
        lambda: oracle_accuracy(odd.view(1, 3)),
    ):
        with pytest.raises(ValueError, match=f"0 and 1, got {float(value)}"):
            function()


# --- how alike ----------------------------------------------------------------------------------

CORRECT = torch.tensor(
    [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]
)


def test_disagreement_table():
    labels = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [4, 0, 1, 2, 3]])
    assert disagreement(labels).tolist() == [[0.0, 0.2, 1.0], [0.2, 0.0, 1.0], [1.0, 1.0, 0.0]]
    assert disagreement(labels[:1]).tolist() == [[0.0]]


def test_error_correlation_table():
    half = [[1.0, 0.0, 0.5, -1.0], [0.0, 1.0, 0.5, 0.0], [0.5, 0.5, 1.0, -0.5], [-1, 0, -0.5, 1]]
    found = error_correlation(CORRECT)
    torch.testing.assert_close(found, torch.tensor(half, dtype=torch.float64))


def test_error_correlation_equals_torchs_and_is_that_of_errors():
    correct = torch.rand(5, 97, generator=seeded()) < torch.linspace(0.1, 0.9, 5).view(-1, 1)
    found = error_correlation(correct)
    torch.testing.assert_close(found, torch.corrcoef(correct.double()))
    torch.testing.assert_close(found, error_correlation(~correct))
    assert found.abs().max() <= 1


@pytest.mark.parametrize("samples", [4, 7, 10_000])
def test_members_without_errors_are_no_nan(samples):
    varied = torch.arange(samples) % 3 == 0
    correct = torch.stack([torch.ones(samples).bool(), varied, torch.zeros(samples).bool()])
    assert torch.equal(error_correlation(correct), torch.eye(3, dtype=torch.float64))


def test_oracle_table():
    assert oracle_accuracy(CORRECT[:1]) == 0.5
    assert oracle_accuracy(CORRECT[:2]) == 0.75
    assert oracle_accuracy(CORRECT) == 1.0
    assert oracle_accuracy(torch.zeros(3, 4).bool()) == 0.0


@pytest.mark.parametrize("function", [disagreement, error_correlation, oracle_accuracy])
@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0)])
def test_members_of_another_shape(function, shape):
    with pytest.raises(ValueError, match="members, samples"):
        function(torch.zeros(shape, dtype=torch.int64))

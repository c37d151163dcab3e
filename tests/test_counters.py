"""Random numbers from counters: SplitMix64's own, uniform, and the same for whoever draws them."""

import math

import numpy as np
import pytest
import torch

from harness.counters import GAMMA, SampleStreams, splitmix64


def draw(k, places=range(6), seed=3, stream="views", counter=7):
    places = torch.tensor(list(places))
    return SampleStreams(seed, stream, counter, places=places)(len(places), k)


def test_numbers_are_splitmix64s():
    """Its published outputs for the seeds 0 and 1234567."""
    published = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    for seed, outputs in published.items():
        states = seed + np.arange(1, 4, dtype=np.uint64) * GAMMA
        assert splitmix64(states).tolist() == outputs


def test_a_samples_numbers_do_not_depend_on_the_others():
    whole = draw(5, range(24))
    assert whole.shape == (24, 5) and whole.dtype == torch.float64
    for places in ([0], [23], [7, 8, 9], [20, 3, 3], range(24)):
        assert torch.equal(draw(5, places), whole[list(places)])


def test_calls_follow_each_other():
    streams = SampleStreams(3, "views", 7, places=torch.arange(6))
    several = [streams(6, k) for k in (2, 0, 1, 23)]
    assert [tuple(part.shape) for part in several] == [(6, 2), (6, 0), (6, 1), (6, 23)]
    assert torch.equal(torch.cat(several, dim=1), draw(26))


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"stream": "features"}, {"counter": 8}, {"places": range(6, 12)}]
)
def test_other_counters_give_other_numbers(other):
    assert not set(draw(9).flatten().tolist()) & set(draw(9, **other).flatten().tolist())


def test_streams_are_for_as_many_samples_as_they_have():
    with pytest.raises(AssertionError, match="6 streams are not for 5 samples"):
        SampleStreams(0, "views", places=torch.arange(6))(5, 1)


def test_numbers_are_uniform_and_unrelated():
    n = 4000
    rows = torch.cat([draw(3, range(n), counter=step).T for step in (0, 1, 2)])
    rows = torch.cat([rows, draw(n, (0, 1, n, 2**31))])  # along samples, and within one
    assert rows.min() >= 0 and rows.max() < 1
    for row in rows:
        gap = (row.sort().values - (torch.arange(n) + 0.5) / n).abs().max() + 0.5 / n
        assert gap < 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov, p = 0.001
    correlation = torch.corrcoef(torch.cat([rows, rows.roll(1, 1)]))
    off = correlation - torch.eye(len(correlation))
    assert off.abs().max() < 4.5 / math.sqrt(n)

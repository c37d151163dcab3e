"""Randomness from counters: the same numbers come back for the same (seed, stream, step).

No random state is ever saved: every step makes its generators from its number, so a resumed run
draws what the uninterrupted run would have drawn. Each sample has a stream of its own, so a process
draws for its own samples only.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

GAMMA = 0x9E3779B97F4A7C15  # from one state of SplitMix64 to the next


def seed_of(seed, stream, *counters):
    """A 63-bit seed for `stream` (a word such as "order" or "mixing") at these counters (ints)."""
    text = ":".join([str(int(seed)), stream, *(str(int(c)) for c in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed, stream, *counters):
    """A CPU torch.Generator seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, stream, *counters))


class SampleStreams:
    """Uniform random numbers for samples, each with a stream of its own.

    Called as (n, k): the next k numbers of each of the n samples, float64 (n, k) in [0, 1). They
    depend on (seed, stream, counters, place of the sample) only, not on the other samples: several
    processes that share a batch draw for each sample what a single process would draw.

    places: int64 (n,), the samples' numbers in the whole batch, 0 to 2³² - 1.

    One sequence of SplitMix64, in which the stream of place p begins at number p · 2³². It
    draws all views of 1,024 images in 0.6 ms; with a torch.Generator for every 128 it takes 1.7 ms.
    """

    def __init__(self, seed, stream, *counters, places):
        start = places.numpy().astype(np.uint64)[:, None] << 32
        self._states = start * GAMMA + seed_of(seed, stream, *counters)
        self._drawn = 0

    def __call__(self, n, k):
        assert n == len(self._states), f"{len(self._states)} streams are not for {n} samples"
        numbers = np.arange(self._drawn + 1, self._drawn + k + 1, dtype=np.uint64)
        self._drawn += k
        bits = splitmix64(self._states + numbers * GAMMA)  # uint64 wraps around
        return torch.from_numpy((bits >> 11) * 2.0**-53)


def splitmix64(states):
    """SplitMix64's output of each state, both uint64.

    Steele et al. 2014, https://doi.org/10.1145/2714064.2660195
    """
    bits = (states ^ (states >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)

"""Randomness from counters: the same numbers come back for the same (seed, stream, step).

No random state is ever saved: whoever needs randomness at a step makes its generator anew from the
step, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed, stream, *counters):
    """A 63-bit seed for `stream` (a word such as "order" or "mixing") at these counters (ints)."""
    text = ":".join([str(int(seed)), stream, *(str(int(c)) for c in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed, stream, *counters):
    """A CPU torch.Generator seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, stream, *counters))

"""Counter-based random numbers: a draw is a pure function of its key, so it depends on no order of calls."""

from __future__ import annotations

import numpy as np

MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def hash64(*words: int) -> int:
    """Mix unsigned 64-bit words into one (a SplitMix64 chain). The order of the words matters."""
    state = _GOLDEN
    for word in words:
        state = ((state ^ word) + _GOLDEN) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state


def uniform(*words: int) -> float:
    """The number in [0, 1) that belongs to this key (53 random bits)."""
    return (hash64(*words) >> 11) * 2.0**-53


def generator(*words: int) -> np.random.Generator:
    """A numpy generator over the counter-based Philox stream that belongs to this key."""
    return np.random.Generator(np.random.Philox(key=hash64(*words)))

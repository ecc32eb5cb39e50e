"""Random numbers without a generator: each is a function of what it is for, so a replay repeats them bit by bit."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["bit_length", "mix", "uniform"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(seed: NDArray[np.uint64], step: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the ``step``-th output of SplitMix64 (Steele et al. 2014) started at ``seed``."""
    with np.errstate(over="ignore"):
        x = seed + (step + np.uint64(1)) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _FIRST
        x = (x ^ (x >> np.uint64(27))) * _SECOND
    result: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return result


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return numbers strictly between 0 and 1 from the upper 53 of 64 bits."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53


def bit_length(x: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return how many bits numbers below 2**53 need; 0 needs none."""
    result: NDArray[np.int64] = np.frexp(x.astype(np.float64))[1].astype(np.int64)
    return result

"""Counters that need little room: distinct values (HyperLogLog) and the most frequent ones (Misra-Gries).

Shape letters: N principals, R registers, K slots.
"""

import math

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.mixing import bit_length

__all__ = ["count_key", "distinct", "register_of"]

_BITS = 48
"""Bits of a hash that decide a rank; more would not be exact in floating point."""


def register_of(hashes: NDArray[np.uint64], registers: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the register of each hash and its rank: leading zeros of the other bits, plus one."""
    index = (hashes % np.uint64(registers)).astype(np.int64)
    rank = _BITS - bit_length(hashes >> np.uint64(64 - _BITS)) + 1
    return index, rank.astype(np.uint8)


def distinct(registers_NR: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Estimate how many different values were seen, [N].

    Flajolet et al. 2007: the harmonic mean, and linear counting where it is below 2.5 R and a register is empty. The
    standard error is 1.04 / sqrt(R).
    """
    count = registers_NR.shape[-1]
    alpha = 0.7213 / (1 + 1.079 / count)
    raw = alpha * count**2 / np.ldexp(1.0, -registers_NR.astype(np.int64)).sum(axis=-1)
    empty = (registers_NR == 0).sum(axis=-1)
    linear = count * (math.log(count) - np.log(np.maximum(empty, 1)))
    result: NDArray[np.float64] = np.where((raw <= 2.5 * count) & (empty > 0), linear, raw)
    return result


def count_key(keys_NK: NDArray[np.uint64], counts_NK: NDArray[np.uint32], key: NDArray[np.uint64]) -> None:
    """Count one key of each principal, in place; 0 is not counted.

    Misra and Gries 1982: a key without a slot takes an empty one, or one off every count. A count is too low by at
    most ``n / (K + 1)``.
    """
    seen = key != 0
    match_NK = (keys_NK == key[:, None]) & (counts_NK > 0) & seen[:, None]
    counts_NK += match_NK
    empty_NK = counts_NK == 0
    fresh = seen & ~match_NK.any(axis=1)
    placed = np.flatnonzero(fresh & empty_NK.any(axis=1))
    slot = empty_NK[placed].argmax(axis=1)
    counts_NK -= (fresh & ~empty_NK.any(axis=1))[:, None]
    keys_NK[placed, slot], counts_NK[placed, slot] = key[placed], 1

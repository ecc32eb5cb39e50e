"""Thresholds over whole principals, and requests to detection with misses as infinite.

Shape letters: N principals or streams.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["conformal_threshold", "median_queries", "thresholds_by_stratum"]

Doubles = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]

LEAST = 99
"""Calibration principals below which a stratum borrows everybody's threshold: fewer give none at 1%."""


def conformal_threshold(score_N: Floats, alpha: float) -> float:
    """Return what a new principal's highest score exceeds with probability at most alpha; infinite if N is too small.

    The ``ceil((N + 1) (1 - alpha))``-th smallest score of N principals that are exchangeable with the new one.
    """
    place = int(np.ceil((len(score_N) + 1) * (1 - alpha) - 1e-9))
    return float(np.sort(score_N)[place - 1]) if place <= len(score_N) else np.inf


def thresholds_by_stratum(score_N: Floats, strata: Sequence[str], alpha: float) -> dict[str, float]:
    """Return a threshold for each stratum with enough principals, and everybody's under the empty name."""
    names = np.array(strata)
    found = {"": conformal_threshold(score_N, alpha)}
    for name in sorted(set(strata)):
        if np.count_nonzero(names == name) >= LEAST:
            found[name] = conformal_threshold(score_N[names == name], alpha)
    return found


def median_queries(queries_N: Sequence[float] | Doubles) -> float:
    """Return the median of requests to detection, infinite where fewer than half were found.

    Of an even number it is the upper of the two middle ones: nothing is averaged with infinity.
    """
    return float(np.sort(np.array(queries_N, dtype=np.float64))[len(queries_N) // 2]) if len(queries_N) else np.inf

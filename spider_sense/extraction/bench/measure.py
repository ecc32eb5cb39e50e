"""Thresholds over whole principals, requests to detection with misses as infinite, and intervals.

Shape letters: N principals or streams.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.metrics import Interval, clopper_pearson

__all__ = ["conformal_threshold", "grouped_interval", "median_queries", "rate_interval", "thresholds_by_stratum"]

Doubles = NDArray[np.float64]

LEAST = 99
"""Calibration principals below which a stratum borrows everybody's threshold: fewer give none at 1%."""


def conformal_threshold(score_N: Doubles, alpha: float) -> float:
    """Return what a new principal's highest score exceeds with probability at most alpha; infinite if N is too small.

    The ``ceil((N + 1) (1 - alpha))``-th smallest score of N principals that are exchangeable with the new one.
    """
    place = int(np.ceil((len(score_N) + 1) * (1 - alpha) - 1e-9))
    return float(np.sort(score_N)[place - 1]) if place <= len(score_N) else np.inf


def thresholds_by_stratum(score_N: Doubles, strata: Sequence[str], alpha: float) -> dict[str, float]:
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


def rate_interval(
    flags: Sequence[bool], clusters: Sequence[Any], resamples: int, seed: int = 0
) -> tuple[float, Interval]:
    """Return a rate and its 95% interval, the wider of two at either end.

    One is Clopper and Pearson's over principals, the other a bootstrap over clusters, such as families, whose
    principals fail together.
    """
    rate = float(np.mean(flags)) if len(flags) else 0.0
    exact = clopper_pearson(int(np.sum(flags)), len(flags))
    if not len(flags):
        return rate, exact
    drawn = grouped_interval(flags, clusters, lambda values: float(np.mean(values)), resamples, seed)
    return rate, Interval(min(exact.low, drawn.low), max(exact.high, drawn.high))


def grouped_interval(
    values: Sequence[float],
    clusters: Sequence[Any],
    statistic: Callable[[Doubles], float],
    resamples: int,
    seed: int = 0,
) -> Interval:
    """Return the 95% percentile interval of a statistic, clusters drawn first and then values within each."""
    rows: dict[Any, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        rows.setdefault(cluster, []).append(float(value))
    groups = [np.array(group) for group in rows.values()]
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    for index in range(resamples):
        chosen = [groups[place] for place in generator.integers(len(groups), size=len(groups))]
        drawn = [group[generator.integers(len(group), size=len(group))] for group in chosen]
        found[index] = statistic(np.concatenate(drawn))
    # "lower" takes values that occurred: between a number and infinity there is nothing.
    low, high = np.quantile(found, [0.025, 0.975], method="lower")
    return Interval(float(low), float(high))

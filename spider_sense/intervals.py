"""Intervals of what is measured on clusters, whose members fail together, and in the rounds of a benchmark."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.rates import Interval, clopper_pearson

__all__ = ["grouped_interval", "rate_interval", "ratio_of_rounds"]

Doubles = NDArray[np.float64]


def rate_interval(flags: Sequence[bool], clusters: Sequence[Any], resamples: int) -> tuple[float, Interval]:
    """Return a rate and its 95% interval, the wider of two at either end.

    One is Clopper and Pearson's over all flags, the other a bootstrap over clusters, such as families of principals or
    the owners of traces, whose members fail together.
    """
    rate = float(np.mean(flags)) if len(flags) else 0.0
    exact = clopper_pearson(int(np.sum(flags)), len(flags))
    if not len(flags):
        return rate, exact
    drawn = grouped_interval(flags, clusters, lambda values: float(np.mean(values)), resamples)
    return rate, Interval(min(exact.low, drawn.low), max(exact.high, drawn.high))


def grouped_interval(
    values: Sequence[float], clusters: Sequence[Any], statistic: Callable[[Doubles], float], resamples: int
) -> Interval:
    """Return the 95% percentile interval of a statistic, clusters drawn first and then values within each."""
    rows: dict[Any, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        rows.setdefault(cluster, []).append(float(value))
    groups = [np.array(group) for group in rows.values()]
    generator = np.random.default_rng(0)
    found = np.empty(resamples)
    for index in range(resamples):
        chosen = [groups[place] for place in generator.integers(len(groups), size=len(groups))]
        drawn = [group[generator.integers(len(group), size=len(group))] for group in chosen]
        found[index] = statistic(np.concatenate(drawn))
    # "lower" takes values that occurred: between a number and infinity there is nothing.
    low, high = np.quantile(found, [0.025, 0.975], method="lower")
    return Interval(float(low), float(high))


def ratio_of_rounds(over: Sequence[float], under: Sequence[float]) -> tuple[float, Interval]:
    """Return the median of the ratios of each round of a benchmark, and its 95% bootstrap interval over rounds."""
    ratios = np.asarray(over, np.float64) / np.asarray(under, np.float64)
    draws = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
    return float(np.median(ratios)), Interval(float(low), float(high))

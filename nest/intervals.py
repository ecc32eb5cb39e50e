"""Bootstrap intervals over prompts: of means, of ratios of sums, and of paired differences.

Percentile intervals at 95% (Efron and Tibshirani, 1993). Draws depend on the seed and the number of rows only, so the
same rows of two runs are drawn together. Where all outcomes of a rate are the same, no resample differs and the
interval would have no width; Clopper-Pearson's for 0 or n of n is given instead. So it is with two runs that agree on
every row, or on none: as far to each side as a difference can lie.

Shape letters: N rows, S resamples, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spider_sense.errors import DataError

__all__ = ["RESAMPLES", "Estimate", "group_mean", "mean", "paired_difference", "ratio"]

RESAMPLES = 2000
_TAIL = 0.025
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float
    n: int
    """Rows it rests on."""

    def json(self) -> dict[str, float]:
        """Return it as JSON-ready keys and values."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def mean(values: Sequence[float] | Doubles, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean of N outcomes.

    Args:
        values: one a prompt; True and False count as 1 and 0.
        seed: of the resampling.
        resamples: how many.

    Raises:
        DataError: if there is none.
    """
    values_N = _checked(values)
    value = float(values_N.mean())
    if np.isin(values_N, (0.0, 1.0)).all() and value in (0.0, 1.0):
        return _unanimous(value, len(values_N))
    return _estimate(value, _draws(len(values_N), seed, resamples) @ values_N / len(values_N), len(values_N))


def ratio(
    tops: Sequence[float], bottoms: Sequence[float], seed: int = 0, resamples: int = RESAMPLES, exponent: bool = False
) -> Estimate:
    """Return sum(tops) / sum(bottoms), such as nats per token over documents.

    Args:
        tops: N numerators.
        bottoms: N denominators, positive.
        seed: of the resampling.
        resamples: how many.
        exponent: return exp of the ratio; of nats per token that is the perplexity.

    Raises:
        DataError: if there is none, or the numbers differ.
    """
    tops_N, bottoms_N = _checked(tops), _checked(bottoms)
    if len(tops_N) != len(bottoms_N):
        raise DataError(f"{len(tops_N)} numerators and {len(bottoms_N)} denominators; give one of each a row")
    draws_SN = _draws(len(tops_N), seed, resamples)
    ratios = np.append(tops_N.sum() / bottoms_N.sum(), (draws_SN @ tops_N) / (draws_SN @ bottoms_N))
    if exponent:
        ratios = np.exp(ratios)
    return _estimate(float(ratios[0]), ratios[1:], len(tops_N))


def group_mean(
    groups: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES, least: float = 0.0
) -> Estimate:
    """Return the mean of G groups' means, such as tasks of different sizes; rows are drawn within each group.

    Args:
        groups: outcomes from 0 to 1, or differences between two.
        seed: of the resampling.
        resamples: how many.
        least: an outcome can be; -1 for differences.

    Raises:
        DataError: if there is no group, or one is empty.
    """
    if not groups:
        raise DataError("no groups to take the mean of; measure at least one")
    arrays = [_checked(group) for group in groups]
    resampled = [
        _draws(len(rows_N), seed + number, resamples) @ rows_N / len(rows_N) for number, rows_N in enumerate(arrays)
    ]
    value = float(np.mean([rows_N.mean() for rows_N in arrays]))
    if all(np.ptp(rows_N) == 0 and rows_N[0] in (-1.0, 0.0, 1.0) for rows_N in arrays):
        reach = float(np.mean([_unanimous(0.0, len(rows_N)).high for rows_N in arrays]))
        return _within(value, reach, least, sum(map(len, arrays)))
    return _estimate(value, np.mean(resampled, axis=0), sum(map(len, arrays)))


def paired_difference(
    ours: Sequence[float], base: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Return the mean of ``ours - base`` over the same N rows, each drawn with its partner.

    Raises:
        DataError: if there is none, or the numbers differ.
    """
    ours_N, base_N = _checked(ours), _checked(base)
    if len(ours_N) != len(base_N):
        raise DataError(f"{len(ours_N)} rows against {len(base_N)}; pair runs over the same prompts")
    difference_N = ours_N - base_N
    if np.ptp(difference_N) == 0 and difference_N[0] in (-1.0, 0.0, 1.0):
        reach = _unanimous(0.0, len(difference_N)).high
        return _within(float(difference_N[0]), reach, -1.0, len(difference_N))
    draws_SN = _draws(len(ours_N), seed, resamples)
    return _estimate(float(difference_N.mean()), draws_SN @ difference_N / len(ours_N), len(ours_N))


def _checked(values: Any) -> Doubles:
    values_N = np.asarray(values, dtype=np.float64)
    if not values_N.size:
        raise DataError("no rows to take an interval over; measure at least one prompt")
    return values_N


def _draws(n: int, seed: int, resamples: int) -> Doubles:
    """Return how often each row is in each resample, [S, N]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def _estimate(value: float, resampled_S: Doubles, n: int) -> Estimate:
    low, high = np.quantile(resampled_S, (_TAIL, 1 - _TAIL))
    return Estimate(value=value, low=float(low), high=float(high), n=n)


def _within(value: float, reach: float, least: float, n: int) -> Estimate:
    return Estimate(value=value, low=max(least, value - reach), high=min(1.0, value + reach), n=n)


def _unanimous(value: float, n: int) -> Estimate:
    bound = _TAIL ** (1 / n)
    low, high = (bound, 1.0) if value else (0.0, 1 - bound)
    return Estimate(value=value, low=low, high=high, n=n)

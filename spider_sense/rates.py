"""Rates of what a threshold flags, with their intervals, which are Clopper-Pearson's (Biometrika 26, 1934).

A score that is not a number counts as +inf, because a monitor that cannot score must flag; a row is flagged where
``not (score < threshold)``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spider_sense.errors import ConfigError, DataError, MissingExtraError

__all__ = [
    "Bools",
    "Doubles",
    "Floats",
    "Interval",
    "Rate",
    "clopper_pearson",
    "flaggable",
    "highest_unflagged",
    "most_within",
    "rate_above",
    "rate_of",
]

Floats = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share of n rows with its 95% Clopper-Pearson interval; of no rows: None, and the interval 0 to 1."""

    value: float | None
    low: float
    high: float
    n: int

    def json(self) -> dict[str, float | None]:
        """Return ``value``, ``low`` and ``high``, ready for JSON; of no rows each is None."""
        if self.value is None:
            return {"value": None, "low": None, "high": None}
        return {"value": self.value, "low": self.low, "high": self.high}


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval of a binomial proportion; 0 to 1 where there was no trial.

    Raises:
        ConfigError: if successes exceed trials, one is negative, or the confidence is not in (0, 1).
        MissingExtraError: if scipy is not installed.
    """
    if not 0 <= successes <= trials:
        raise ConfigError(f"{successes} successes of {trials} trials; successes must lie in 0..trials")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence}; choose a number between 0 and 1, for example 0.95")
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        raise MissingExtraError("scipy", "train") from error
    tail, failures = (1 - confidence) / 2, trials - successes
    low = float(betaincinv(successes, failures + 1, tail)) if successes else 0.0
    high = float(betaincinv(successes + 1, failures, 1 - tail)) if failures else 1.0
    return Interval(low=low, high=high)


def rate_of(flags: Bools) -> Rate:
    """Share of the flags ``[N]`` that are set.

    Raises:
        MissingExtraError: if scipy is not installed.
    """
    interval = clopper_pearson(int(flags.sum()), flags.size)
    value = float(flags.mean()) if flags.size else None
    return Rate(value=value, low=interval.low, high=interval.high, n=flags.size)


def rate_above(scores: Floats, threshold: float) -> Rate:
    """Share of the scores ``[N]`` that are flagged: ``not (score < threshold)``.

    Raises:
        MissingExtraError: if scipy is not installed.
    """
    return rate_of(~(flaggable(scores) < threshold))


def flaggable(scores: Floats) -> Doubles:
    """The scores in float64, what is not a number as +inf: it is above every threshold."""
    doubles = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(doubles), np.inf, doubles)


def most_within(rate: float, n: int) -> int:
    """Largest count k below n with k / n <= rate, robust to the rounding of ``rate * n``.

    Raises:
        ConfigError: unless 0 <= rate < 1.
        DataError: unless n is positive.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"false-positive rate {rate} is out of range; choose 0 <= rate < 1, for example 0.01")
    if n < 1:
        raise DataError(f"{n} negatives; a false-positive rate needs at least one")
    nearest_count = round(rate * n)
    return nearest_count if nearest_count / n <= rate else nearest_count - 1


def highest_unflagged(negatives: Doubles, fpr: float) -> float:
    """The order statistic that a threshold must stay above, so that at most a share ``fpr`` is flagged."""
    index = negatives.size - 1 - most_within(fpr, negatives.size)
    return float(np.partition(negatives, index)[index])

"""Thresholds at chosen false-positive rates, set on the maximum over time of benign conversations.

A conversation is flagged if its score crosses the threshold at any token, so what is calibrated is the maximum over the
whole conversation. That maximum can only grow with length, which is why every length bucket has thresholds of its own.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

from spider_sense.errors import ConfigError, DataError
from spider_sense.rates import clopper_pearson, most_within, rate_above
from spider_sense.types import Zone

__all__ = [
    "LENGTH_BUCKETS",
    "BucketThresholds",
    "Calibration",
    "Threshold",
    "calibrate",
    "check_rates",
    "least_for",
    "zone",
]

LENGTH_BUCKETS: tuple[float, ...] = (32, 128, 512, math.inf)
"""Upper bounds of the length buckets in tokens, inclusive."""

SMALLEST_BUCKET = 50
"""Fewer benign conversations than this never make a threshold of their own, whatever the rates."""

Level = Literal["suspect", "breach"]
LEVELS: tuple[Level, ...] = ("suspect", "breach")

Floats = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer[Any]]


class Threshold(BaseModel):
    """A threshold in logits and how well the benign conversations support it.

    The interval is Clopper-Pearson. It holds although the threshold was placed on the same conversations: that lies
    between the k-th and the (k + 1)-th largest of n scores, the population's shares above these two are distributed as
    Beta(k, n - k + 1) and Beta(k + 1, n - k), and quantiles of these are the two ends of the interval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: FiniteFloat
    target_fpr: float
    n: int
    """Benign conversations that the threshold was placed on."""
    exceed: int
    """How many of them lie at or above it."""
    fpr_low: float
    fpr_high: float
    needed: int
    """Benign conversations, none of them exceeding, from which "at most target_fpr" follows at 95% confidence."""
    supported: bool
    """Whether n >= needed: fewer conversations could not bear the claim whatever they scored."""

    @property
    def enough(self) -> bool:
        """Whether n allows a threshold of this rate at all, which is less than being sure of it; see
        :func:`least_for`."""
        return self.n >= least_for(self.target_fpr)


class BucketThresholds(BaseModel):
    """The two thresholds of a length bucket."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int | None
    """Upper bound in tokens, inclusive; None: no bound."""
    suspect: Threshold
    breach: Threshold
    pooled: bool
    """Whether conversations of every length were used, because too few were as long as this."""


class Calibration(BaseModel):
    """The thresholds of one detector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suspect_fpr: float
    breach_fpr: float
    buckets: tuple[BucketThresholds, ...]
    """In order of rising max_tokens, the last without bound."""
    n: int
    """Benign conversations in all."""
    horizon_tokens: int
    """The longest prompt calibrated on; nothing is known about the false-positive rate beyond it."""
    response_tokens: int = 0
    """The longest response calibrated on; a longer one has more chances to reach a threshold than were counted."""
    digest: str
    """SHA-256 of the sorted ids of the conversations, as a JSON list."""
    created: str
    """ISO date, UTC."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        bounds = self._bounds()
        if not bounds or bounds[-1] != math.inf or bounds != sorted(set(bounds)):
            listed = [bucket.max_tokens for bucket in self.buckets]
            raise ValueError(f"buckets end at {listed} tokens; the bounds must rise and the last must be None")
        return self

    def _bounds(self) -> list[float]:
        return [math.inf if bucket.max_tokens is None else bucket.max_tokens for bucket in self.buckets]

    def thresholds(self, tokens: int) -> BucketThresholds:
        """The thresholds for a request whose prompt is so many tokens long, in the unit that was calibrated.

        They are chosen once: a stream that changes thresholds as it grows can be flagged once in every bucket that it
        passes, which adds up to several times the rate calibrated.
        """
        return self.buckets[int(np.searchsorted(self._bounds(), tokens))]

    def values(self, level: Level, tokens: Integers) -> Doubles:
        """The thresholds of a level ``[N]`` for prompts ``[N]`` that long."""
        values = np.array([getattr(bucket, level).value for bucket in self.buckets])
        return values[np.searchsorted(self._bounds(), tokens)]

    def rates(self, scores: Floats, labels: npt.NDArray[np.bool_], tokens: Integers) -> dict[str, Any]:
        """Measure rows at the thresholds of their lengths.

        Args:
            scores: ``[N]`` maxima over time.
            labels: ``[N]``, True for a positive.
            tokens: ``[N]`` prompt lengths.

        Returns:
            JSON-ready, for ``suspect`` and ``breach``: ``fpr`` and ``tpr``, each as
            :meth:`spider_sense.rates.Rate.json` gives it.
        """
        result: dict[str, Any] = {}
        for level in LEVELS:
            margins = scores - self.values(level, tokens)
            sides = {"fpr": margins[~labels], "tpr": margins[labels]}
            result[level] = {name: rate_above(side, 0.0).json() for name, side in sides.items()}
        return result


def zone(score: float, bucket: BucketThresholds) -> Zone:
    """Where a score lies; a score that is not a number is a breach, since ``nan < t`` is False for every t."""
    if not score < bucket.breach.value:
        return "breach"
    if not score < bucket.suspect.value:
        return "suspect"
    return "clear"


def least_for(fpr: float) -> int:
    """Return the fewest benign rows on which a threshold of a rate can rest.

    A new row scores above the highest of n others of its kind with probability 1 / (n + 1); with fewer rows even that
    is more than the rate (split conformal prediction, arXiv 2107.07511, section 1).
    """
    return math.ceil(1 / fpr) - 1


def calibrate(
    scores: Floats,
    token_counts: Integers,
    ids: Sequence[str],
    suspect_fpr: float = 0.05,
    breach_fpr: float = 0.01,
    response_tokens: int = 0,
) -> Calibration:
    """Place both thresholds in every length bucket so that at most floor(fpr * n) benign conversations reach them.

    A threshold lies half way between the highest score that must stay below it and the next score above. Where no
    conversation may reach it there is no score above, and it lies 0.05 interquartile ranges over the maximum. A bucket
    of fewer than max(50, ceil(1 / breach_fpr)) conversations is pooled: it takes the threshold of the whole set, but
    none below that of the nearest shorter bucket that has its own.

    Args:
        scores: ``[N]`` maxima over time of benign conversations, in logits.
        token_counts: ``[N]`` lengths in tokens, of the prompts where thresholds are asked for by prompt length.
        ids: N distinct names of the conversations; only their digest is kept.
        suspect_fpr: share of benign conversations that may be suspect or worse.
        breach_fpr: share of benign conversations that may be a breach.
        response_tokens: length of the longest response among them.

    Raises:
        ConfigError: unless 0 < breach_fpr <= suspect_fpr < 1.
        DataError: if there is no conversation, lengths or ids do not fit the scores, or a score is not finite.
        MissingExtraError: if scipy is not installed.
    """
    check_rates(suspect_fpr, breach_fpr)
    _check_set(scores, token_counts, ids)
    return Calibration(
        suspect_fpr=suspect_fpr,
        breach_fpr=breach_fpr,
        buckets=_buckets(scores.astype(np.float64), token_counts, suspect_fpr, breach_fpr),
        n=scores.size,
        horizon_tokens=int(token_counts.max()),
        response_tokens=response_tokens,
        digest=hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest(),
        created=datetime.now(UTC).date().isoformat(),
    )


def check_rates(suspect_fpr: float, breach_fpr: float) -> None:
    """Check the two rates, before any work that only ends in :func:`calibrate`.

    Raises:
        ConfigError: unless 0 < breach_fpr <= suspect_fpr < 1.
    """
    for name, rate in (("suspect_fpr", suspect_fpr), ("breach_fpr", breach_fpr)):
        if not 0 < rate < 1:
            raise ConfigError(f"{name}={rate} is out of range; choose a rate between 0 and 1, for example 0.01")
    if breach_fpr > suspect_fpr:
        raise ConfigError(
            f"breach_fpr={breach_fpr} is above suspect_fpr={suspect_fpr}; a breach must be the rarer of the two"
        )


def _check_set(scores: Floats, token_counts: Integers, ids: Sequence[str]) -> None:
    if scores.ndim != 1 or token_counts.shape != scores.shape or len(ids) != scores.size:
        raise DataError(
            f"scores {scores.shape}, token counts {token_counts.shape} and {len(ids)} ids must be vectors of one length"
        )
    if not scores.size:
        raise DataError("no benign conversation to calibrate on; name a prompt set that has benign rows")
    name, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise DataError(f"id {name!r} occurs {times} times; drop the copies, they would count as new evidence")
    for wrong, what in ((~np.isfinite(scores), "score"), (token_counts < 1, "token count")):
        if wrong.any():
            index = int(np.argmax(wrong))
            value = (scores if what == "score" else token_counts)[index]
            raise DataError(f"{what} {value} of {ids[index]!r} cannot be calibrated on; fix or remove that row")


def _buckets(
    scores: Doubles, token_counts: Integers, suspect_fpr: float, breach_fpr: float
) -> tuple[BucketThresholds, ...]:
    least = max(SMALLEST_BUCKET, math.ceil(1 / breach_fpr))
    bucket_of = np.searchsorted(LENGTH_BUCKETS, token_counts)
    suspect_floor = breach_floor = -math.inf
    buckets = []
    for index, bound in enumerate(LENGTH_BUCKETS):
        own = scores[bucket_of == index]
        pooled = own.size < least
        suspect = _threshold(scores, suspect_fpr, suspect_floor) if pooled else _threshold(own, suspect_fpr)
        breach = _threshold(scores, breach_fpr, breach_floor) if pooled else _threshold(own, breach_fpr)
        suspect_floor, breach_floor = suspect.value, breach.value
        max_tokens = None if bound == math.inf else int(bound)
        buckets.append(BucketThresholds(max_tokens=max_tokens, suspect=suspect, breach=breach, pooled=pooled))
    return tuple(buckets)


def _threshold(scores: Doubles, fpr: float, floor: float = -math.inf) -> Threshold:
    value = max(_place(scores, fpr), floor)
    exceed = int(np.count_nonzero(scores >= value))
    interval = clopper_pearson(exceed, scores.size)
    needed = math.ceil(math.log(0.05) / math.log1p(-fpr))
    return Threshold(
        value=value,
        target_fpr=fpr,
        n=scores.size,
        exceed=exceed,
        fpr_low=interval.low,
        fpr_high=interval.high,
        needed=needed,
        supported=scores.size >= needed,
    )


def _place(scores: Doubles, fpr: float) -> float:
    ordered = np.sort(scores)
    below = ordered[-1 - most_within(fpr, scores.size)]
    above = ordered[ordered > below]
    if not above.size:
        first, third = np.percentile(ordered, [25, 75])
        return float(max(below + 0.05 * (third - first), np.nextafter(below, np.inf)))
    middle = below / 2 + above[0] / 2
    return float(middle if middle > below else above[0])

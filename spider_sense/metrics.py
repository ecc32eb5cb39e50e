"""How well scores separate two classes: ROC, its area at low false-positive rates, and rates with their intervals.

A higher score is more suspicious, a label of True is a positive. A score that is not a number counts as +inf, because a
monitor that cannot score must flag; a row is flagged where ``not (score < threshold)``. Where a class is missing the
answer is None, never a guess. Intervals are Clopper-Pearson (Biometrika 26, 1934).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spider_sense.errors import ConfigError, DataError, MissingExtraError

__all__ = [
    "Interval",
    "OperatingPoint",
    "PairedDifference",
    "Rate",
    "auroc",
    "auroc_interval",
    "clopper_pearson",
    "log_auroc",
    "most_within",
    "paired_bootstrap_tpr_difference",
    "rate_above",
    "roc_points",
    "summary",
    "tpr_at_fpr",
    "tpr_interval",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """What a threshold chosen for a false-positive rate achieves on the rows it was chosen on."""

    fpr: float
    """The rate asked for."""
    threshold: float
    """In float64: rounded to a narrower type it may fall onto the score that it must stay above."""
    tpr: Rate
    achieved_fpr: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Bootstrap distribution of a difference a - b: its mean and 95% percentile interval."""

    mean: float
    low: float
    high: float


def auroc(scores: Floats, labels: Bools) -> float | None:
    """Probability that a random positive scores above a random negative, ties counting half (midranks).

    Args:
        scores: ``[N]``.
        labels: ``[N]``.

    Raises:
        DataError: if the shapes differ.
    """
    positives, negatives = _split(scores, labels)
    if not positives.size or not negatives.size:
        return None
    _, inverse, counts = np.unique(np.concatenate([positives, negatives]), return_inverse=True, return_counts=True)
    midranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    wins = midranks[: positives.size].sum() - positives.size * (positives.size + 1) / 2
    return float(wins / (positives.size * negatives.size))


def auroc_interval(
    scores: Floats, labels: Bools, groups: Sequence[str], resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """95% percentile interval of the AUROC over resamples of whole groups; None where a class is missing.

    Rows that share a context are no independent evidence, so groups are drawn, with replacement. A resample that lacks
    a class is drawn again.

    Args:
        scores: ``[N]``.
        labels: ``[N]``.
        groups: N names.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Raises:
        DataError: if the shapes differ.
    """
    return _grouped(auroc, scores, labels, groups, resamples, seed)


def tpr_interval(
    scores: Floats, labels: Bools, groups: Sequence[str], fpr: float, resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """95% interval of the true-positive rate at one false-positive rate, groups as in :func:`auroc_interval`.

    The wider, at either end, of Clopper-Pearson's and of one over resamples of whole groups, in each of which the
    threshold is chosen anew. No resample has a negative above the highest one there is: where 1% of the negatives is
    less than one of them, the interval says little of how much higher a threshold for 1% of all would lie.

    Args:
        scores: ``[N]``.
        labels: ``[N]``.
        groups: N names.
        fpr: false-positive rate to stay within.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Raises:
        ConfigError: unless 0 <= fpr < 1.
        DataError: if the shapes differ.
    """
    exact = tpr_at_fpr(scores, labels, fpr).tpr
    drawn = _grouped(
        lambda some, kinds: tpr_at_fpr(some, kinds, fpr).tpr.value, scores, labels, groups, resamples, seed
    )
    return None if drawn is None else Interval(low=min(exact.low, drawn.low), high=max(exact.high, drawn.high))


def roc_points(scores: Floats, labels: Bools) -> tuple[Doubles, Doubles]:
    """Vertices of the ROC curve, one for each distinct score from the highest down, after (0, 0).

    Args:
        scores: ``[N]``.
        labels: ``[N]``.

    Returns:
        False-positive rates and true-positive rates, both ``[distinct + 1]``, never falling, ending at (1, 1).

    Raises:
        DataError: if the shapes differ or a class is missing.
    """
    positives, negatives = _split(scores, labels)
    if not positives.size or not negatives.size:
        raise DataError(
            f"a ROC curve needs both classes, got {positives.size} positives and {negatives.size} negatives; "
            "use rate_above for one class"
        )
    thresholds = np.unique(np.concatenate([positives, negatives]))[::-1]
    fpr, tpr = (
        np.concatenate([[0.0], (rows.size - np.searchsorted(np.sort(rows), thresholds, side="left")) / rows.size])
        for rows in (negatives, positives)
    )
    return fpr, tpr


def log_auroc(scores: Floats, labels: Bools, low: float = 1e-3, high: float = 1e-1) -> float | None:
    """Area under the true-positive rate against log10 of the false-positive rate, normalised to 0..1.

    The ROC is a step function: at a rate f it has the best true-positive rate of a threshold whose empirical
    false-positive rate is at most f; nothing is interpolated. With n negatives no rate between 0 and 1/n can be
    observed, so from ``low`` up to 1/n the curve stays at its value with no false positive at all. Chance, with many
    negatives, is (high - low) / ln(high / low): 0.021 for the default range. The measure is that of "Cost-Effective
    Constitutional Classifiers via Representation Re-use" (2025).

    Args:
        scores: ``[N]``.
        labels: ``[N]``.
        low: lowest false-positive rate.
        high: highest false-positive rate.

    Raises:
        ConfigError: unless 0 < low < high <= 1.
        DataError: if the shapes differ.
    """
    if not 0 < low < high <= 1:
        raise ConfigError(f"log_auroc integrates from low={low} to high={high}; choose 0 < low < high <= 1")
    positives, negatives = _split(scores, labels)
    if not positives.size or not negatives.size:
        return None
    fpr, tpr = roc_points(scores, labels)
    edges = np.log10(np.append(np.clip(fpr, low, high), high))
    return float(np.sum(tpr * np.diff(edges)) / (np.log10(high) - np.log10(low)))


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


def rate_above(scores: Floats, threshold: float) -> Rate:
    """Share of the scores ``[N]`` that are flagged: ``not (score < threshold)``.

    Raises:
        MissingExtraError: if scipy is not installed.
    """
    return _rate(~(_doubles(scores) < threshold))


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


def tpr_at_fpr(scores: Floats, labels: Bools, fpr: float) -> OperatingPoint:
    """True-positive rate at the smallest threshold that flags at most a share ``fpr`` of the negatives.

    Tied negatives are flagged together or not at all, so the achieved rate may be lower than the one asked for. Where
    too many negatives are infinite or not a number for any threshold to reach the rate, the threshold is +inf, the
    true-positive rate 0, and the achieved rate shows the excess. Without negatives no threshold can be chosen: it is
    +inf and both rates are None; without positives only the true-positive rate is None.

    Args:
        scores: ``[N]``.
        labels: ``[N]``.
        fpr: false-positive rate to stay within.

    Raises:
        ConfigError: unless 0 <= fpr < 1.
        DataError: if the shapes differ.
        MissingExtraError: if scipy is not installed.
    """
    positives, negatives = _split(scores, labels)
    if not negatives.size:
        unknown = _rate(np.empty(0, dtype=bool))
        return OperatingPoint(fpr=fpr, threshold=np.inf, tpr=unknown, achieved_fpr=unknown)
    unflagged = _highest_unflagged(negatives, fpr)
    threshold = float(np.nextafter(unflagged, np.inf))
    return OperatingPoint(
        fpr=fpr, threshold=threshold, tpr=_rate(positives > unflagged), achieved_fpr=rate_above(negatives, threshold)
    )


def paired_bootstrap_tpr_difference(
    scores_a: Floats, scores_b: Floats, labels: Bools, fpr: float, resamples: int = 1000, seed: int = 0
) -> PairedDifference | None:
    """True-positive rate of a minus that of b at one false-positive rate, resampled; None where a class is missing.

    Each resample draws positives and negatives separately with replacement (stratified), the same rows for both systems
    (paired), and chooses both thresholds anew, so that the uncertainty of the thresholds is in the interval.

    Args:
        scores_a: ``[N]``.
        scores_b: ``[N]``, the same rows scored by the other system.
        labels: ``[N]``.
        fpr: false-positive rate to stay within.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Raises:
        ConfigError: unless 0 <= fpr < 1 and resamples is positive.
        DataError: if the shapes differ.
    """
    if resamples < 1:
        raise ConfigError(f"resamples={resamples}; choose at least 1, for example 1000")
    split_a, split_b = _split(scores_a, labels), _split(scores_b, labels)
    positives, negatives = split_a[0].size, split_a[1].size
    if not positives or not negatives:
        return None
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    for index in range(resamples):
        rows = generator.integers(positives, size=positives), generator.integers(negatives, size=negatives)
        differences[index] = _tpr(split_a, rows, fpr) - _tpr(split_b, rows, fpr)
    low, high = np.percentile(differences, [2.5, 97.5])
    return PairedDifference(mean=float(differences.mean()), low=float(low), high=float(high))


def summary(scores: Floats, labels: Bools) -> dict[str, Any]:
    """The numbers of a report, ready for JSON: counts, both areas, and the rates caught at 1% and 0.1% false positives.

    Args:
        scores: ``[N]``.
        labels: ``[N]``.

    Returns:
        ``n``, ``positives``, ``auroc``, ``log_auroc``, and ``tpr_at_1pct_fpr`` and ``tpr_at_0_1pct_fpr``, each with
        ``value``, ``low``, ``high``; None wherever a missing class leaves nothing to measure.

    Raises:
        DataError: if the shapes differ.
        MissingExtraError: if scipy is not installed.
    """
    return {
        "n": int(labels.size),
        "positives": int(np.count_nonzero(labels)),
        "auroc": auroc(scores, labels),
        "log_auroc": log_auroc(scores, labels),
        "tpr_at_1pct_fpr": _rate_json(tpr_at_fpr(scores, labels, 0.01).tpr),
        "tpr_at_0_1pct_fpr": _rate_json(tpr_at_fpr(scores, labels, 0.001).tpr),
    }


def _grouped(
    statistic: Callable[[Floats, Bools], float | None],
    scores: Floats,
    labels: Bools,
    groups: Sequence[str],
    resamples: int,
    seed: int,
) -> Interval | None:
    """95% percentile interval over resamples of whole groups; one of which the statistic is None is drawn again."""
    positives, negatives = _split(scores, labels)
    if not positives.size or not negatives.size:
        return None
    generator = np.random.default_rng(seed)
    _, owner = np.unique(np.array(groups), return_inverse=True)
    members = [np.flatnonzero(owner == group) for group in range(owner.max() + 1)]
    found: list[float] = []
    while len(found) < resamples:
        rows = np.concatenate([members[group] for group in generator.integers(len(members), size=len(members))])
        value = statistic(scores[rows], labels[rows])
        if value is not None:
            found.append(value)
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(low=float(low), high=float(high))


def _rate(flags: Bools) -> Rate:
    interval = clopper_pearson(int(flags.sum()), flags.size)
    value = float(flags.mean()) if flags.size else None
    return Rate(value=value, low=interval.low, high=interval.high, n=flags.size)


def _rate_json(rate: Rate) -> dict[str, float | None]:
    if rate.value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": rate.value, "low": rate.low, "high": rate.high}


def _doubles(scores: Floats) -> Doubles:
    doubles = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(doubles), np.inf, doubles)


def _split(scores: Floats, labels: Bools) -> tuple[Doubles, Doubles]:
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise DataError(f"scores {scores.shape} and labels {labels.shape} must be two vectors of the same length")
    mask, doubles = labels.astype(bool), _doubles(scores)
    return doubles[mask], doubles[~mask]


def _highest_unflagged(negatives: Doubles, fpr: float) -> float:
    """The order statistic that a threshold must stay above, so that at most a share ``fpr`` is flagged."""
    index = negatives.size - 1 - most_within(fpr, negatives.size)
    return float(np.partition(negatives, index)[index])


def _tpr(
    split: tuple[Doubles, Doubles], rows: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], fpr: float
) -> float:
    positives, negatives = split[0][rows[0]], split[1][rows[1]]
    return float(np.mean(positives > _highest_unflagged(negatives, fpr)))

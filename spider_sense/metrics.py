"""How well scores separate two classes: ROC, its area at low false-positive rates, and what is caught at one of them.

A higher score is more suspicious, a label of True is a positive; scores are flagged as :mod:`spider_sense.rates` says.
Where a class is missing the answer is None, never a guess.
"""

from dataclasses import dataclass

import numpy as np

from spider_sense.errors import ConfigError, DataError
from spider_sense.rates import Bools, Doubles, Floats, Rate, flaggable, highest_unflagged, rate_above, rate_of

__all__ = ["OperatingPoint", "auroc", "by_class", "log_auroc", "roc_points", "tpr_at_fpr"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """What a threshold chosen for a false-positive rate achieves on the rows it was chosen on."""

    fpr: float
    """The rate asked for."""
    threshold: float
    """In float64: rounded to a narrower type it may fall onto the score that it must stay above."""
    tpr: Rate
    achieved_fpr: Rate


def by_class(scores: Floats, labels: Bools) -> tuple[Doubles, Doubles]:
    """The scores of the positives ``[P]`` and of the negatives ``[N - P]``, what is not a number as +inf.

    Args:
        scores: ``[N]``.
        labels: ``[N]``.

    Raises:
        DataError: if the shapes differ.
    """
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise DataError(f"scores {scores.shape} and labels {labels.shape} must be two vectors of the same length")
    mask, doubles = labels.astype(bool), flaggable(scores)
    return doubles[mask], doubles[~mask]


def auroc(scores: Floats, labels: Bools) -> float | None:
    """Probability that a random positive scores above a random negative, ties counting half (midranks).

    Args:
        scores: ``[N]``.
        labels: ``[N]``.

    Raises:
        DataError: if the shapes differ.
    """
    positives, negatives = by_class(scores, labels)
    if not positives.size or not negatives.size:
        return None
    _, inverse, counts = np.unique(np.concatenate([positives, negatives]), return_inverse=True, return_counts=True)
    midranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    wins = midranks[: positives.size].sum() - positives.size * (positives.size + 1) / 2
    return float(wins / (positives.size * negatives.size))


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
    positives, negatives = by_class(scores, labels)
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
    positives, negatives = by_class(scores, labels)
    if not positives.size or not negatives.size:
        return None
    fpr, tpr = roc_points(scores, labels)
    edges = np.log10(np.append(np.clip(fpr, low, high), high))
    return float(np.sum(tpr * np.diff(edges)) / (np.log10(high) - np.log10(low)))


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
    positives, negatives = by_class(scores, labels)
    if not negatives.size:
        unknown = rate_of(np.empty(0, dtype=bool))
        return OperatingPoint(fpr=fpr, threshold=np.inf, tpr=unknown, achieved_fpr=unknown)
    unflagged = highest_unflagged(negatives, fpr)
    threshold = float(np.nextafter(unflagged, np.inf))
    return OperatingPoint(
        fpr=fpr, threshold=threshold, tpr=rate_of(positives > unflagged), achieved_fpr=rate_above(negatives, threshold)
    )

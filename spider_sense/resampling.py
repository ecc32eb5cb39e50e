"""Intervals of areas and rates by the bootstrap: over whole groups of rows, and of the difference of two systems."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spider_sense.errors import ConfigError
from spider_sense.metrics import auroc, by_class, tpr_at_fpr
from spider_sense.rates import Bools, Doubles, Floats, Interval, highest_unflagged

__all__ = ["PairedDifference", "auroc_interval", "paired_bootstrap_tpr_difference", "tpr_interval"]

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Bootstrap distribution of a difference a - b: its mean and 95% percentile interval."""

    mean: float
    low: float
    high: float


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
    drawn = _grouped(lambda some, kinds: _tpr(*by_class(some, kinds), fpr), scores, labels, groups, resamples, seed)
    return None if drawn is None else Interval(low=min(exact.low, drawn.low), high=max(exact.high, drawn.high))


def paired_bootstrap_tpr_difference(
    scores_a: Floats,
    scores_b: Floats,
    labels: Bools,
    groups: Sequence[str],
    fpr: float,
    resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference | None:
    """True-positive rate of a minus that of b at one false-positive rate, resampled; None where a class is missing.

    Each resample draws whole groups with replacement, the same for both systems (paired), and chooses both thresholds
    anew, so that the uncertainty of the thresholds is in the interval. One that lacks a class is drawn again.

    Args:
        scores_a: ``[N]``.
        scores_b: ``[N]``, the same rows scored by the other system.
        labels: ``[N]``.
        groups: N names.
        fpr: false-positive rate to stay within.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Raises:
        ConfigError: unless 0 <= fpr < 1 and resamples is positive.
        DataError: if the shapes differ.
    """
    if resamples < 1:
        raise ConfigError(f"resamples={resamples}; choose at least 1, for example 1000")
    by_class(scores_a, labels), by_class(scores_b, labels)
    differences = [
        _tpr(*by_class(scores_a[rows], labels[rows]), fpr) - _tpr(*by_class(scores_b[rows], labels[rows]), fpr)
        for rows in _draws(labels, groups, resamples, seed)
    ]
    if not differences:
        return None
    low, high = np.percentile(differences, [2.5, 97.5])
    return PairedDifference(mean=float(np.mean(differences)), low=float(low), high=float(high))


def _grouped(
    statistic: Callable[[Floats, Bools], float | None],
    scores: Floats,
    labels: Bools,
    groups: Sequence[str],
    resamples: int,
    seed: int,
) -> Interval | None:
    """95% percentile interval over resamples of whole groups."""
    by_class(scores, labels)
    found = [statistic(scores[rows], labels[rows]) for rows in _draws(labels, groups, resamples, seed)]
    if not found:
        return None
    low, high = np.percentile(np.array(found, dtype=np.float64), [2.5, 97.5])
    return Interval(low=float(low), high=float(high))


def _draws(labels: Bools, groups: Sequence[str], resamples: int, seed: int) -> Iterator[Counts]:
    """Yield the rows of each resample of whole groups, nothing where a class is missing; a draw without is repeated."""
    if not 0 < np.count_nonzero(labels) < len(labels):
        return
    generator = np.random.default_rng(seed)
    _, owner, sizes = np.unique(np.array(groups), return_inverse=True, return_counts=True)
    by_group, starts = np.argsort(owner, kind="stable"), np.cumsum(sizes) - sizes
    drawn = 0
    while drawn < resamples:
        chosen = generator.integers(len(sizes), size=len(sizes))
        rows = by_group[_ranges(starts[chosen], sizes[chosen])]
        if 0 < np.count_nonzero(labels[rows]) < len(rows):
            drawn += 1
            yield rows


def _ranges(starts: Counts, sizes: Counts) -> Counts:
    """The integers ``start, start + 1, ...`` of each range, ``size`` of them, one range after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(sizes.sum())


def _tpr(positives: Doubles, negatives: Doubles, fpr: float) -> float:
    return float(np.mean(positives > highest_unflagged(negatives, fpr)))

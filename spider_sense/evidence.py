"""What a probe is worth beside its controls, on the same rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spider_sense.metrics import auroc, log_auroc, tpr_at_fpr
from spider_sense.rates import Bools, Floats
from spider_sense.resampling import paired_bootstrap_tpr_difference, tpr_interval

__all__ = ["evidence", "summary"]

REPORTED = {"tpr_at_1pct_fpr": 0.01, "tpr_at_0_1pct_fpr": 0.001}


def evidence(
    guard_scores: Floats, labels: Bools, controls: Mapping[str, Floats], groups: Sequence[str]
) -> dict[str, Any]:
    """Measure the guard and its controls on the same rows.

    Args:
        guard_scores: ``[N]`` maxima over time.
        labels: ``[N]``.
        controls: scores ``[N]`` of each control; ``tfidf`` among them.
        groups: N names; rows of a group are no independent evidence.

    Returns:
        JSON-ready: ``guard`` and each control as :func:`summary`, the paired difference of TPR at 1% FPR to TF-IDF, and
        whether its whole interval lies above zero.
    """
    gain = paired_bootstrap_tpr_difference(guard_scores, controls["tfidf"], labels, groups, 0.01)
    return {
        "guard": summary(guard_scores, labels, groups),
        **{name: summary(scores, labels, groups) for name, scores in controls.items()},
        "tpr_gain_over_tfidf": None if gain is None else {"mean": gain.mean, "low": gain.low, "high": gain.high},
        "beats_tfidf": gain is not None and gain.low > 0,
    }


def summary(scores: Floats, labels: Bools, groups: Sequence[str]) -> dict[str, Any]:
    """The numbers of a report, ready for JSON: counts, both areas, and the rates caught at 1% and 0.1% false positives.

    Args:
        scores: ``[N]``.
        labels: ``[N]``.
        groups: N names; rows of a group are no independent evidence.

    Returns:
        ``n``, ``positives``, ``auroc``, ``log_auroc``, and ``tpr_at_1pct_fpr`` and ``tpr_at_0_1pct_fpr``, each with
        ``value`` and its interval ``low`` to ``high`` by :func:`spider_sense.resampling.tpr_interval`; None wherever a
        missing class leaves nothing to measure.

    Raises:
        DataError: if the shapes differ.
        MissingExtraError: if scipy is not installed.
    """
    return {
        "n": int(labels.size),
        "positives": int(np.count_nonzero(labels)),
        "auroc": auroc(scores, labels),
        "log_auroc": log_auroc(scores, labels),
        **{name: _caught(scores, labels, groups, fpr) for name, fpr in REPORTED.items()},
    }


def _caught(scores: Floats, labels: Bools, groups: Sequence[str], fpr: float) -> dict[str, float | None]:
    interval = tpr_interval(scores, labels, groups, fpr)
    if interval is None:
        return {"value": None, "low": None, "high": None}
    return {"value": tpr_at_fpr(scores, labels, fpr).tpr.value, "low": interval.low, "high": interval.high}

"""What a probe is worth beside its controls, on the same rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from spider_sense.metrics import summary
from spider_sense.resampling import paired_bootstrap_tpr_difference

__all__ = ["evidence"]


def evidence(guard_scores: np.ndarray, labels: np.ndarray, controls: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Measure the guard and its controls on the same rows.

    Args:
        guard_scores: [N] maxima over time.
        labels: [N].
        controls: scores [N] of each control; ``tfidf`` among them.

    Returns:
        JSON-ready: ``guard`` and each control as :func:`spider_sense.metrics.summary`, the paired difference of TPR at
        1% FPR to TF-IDF, and whether its whole interval lies above zero.
    """
    gain = paired_bootstrap_tpr_difference(guard_scores, controls["tfidf"], labels, 0.01)
    return {
        "guard": summary(guard_scores, labels),
        **{name: summary(scores, labels) for name, scores in controls.items()},
        "tpr_gain_over_tfidf": None if gain is None else {"mean": gain.mean, "low": gain.low, "high": gain.high},
        "beats_tfidf": gain is not None and gain.low > 0,
    }

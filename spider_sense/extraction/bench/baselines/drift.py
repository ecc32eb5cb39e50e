"""River's drift detectors on the distance of each request to benign ones.

Both only say yes or no at a setting, so each is run at several: the statistic is the strictest setting that has said
yes so far.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from spider_sense.errors import MissingExtraError
from spider_sense.extraction.bench.baselines.base import Background, Doubles, Trace

__all__ = ["Adwin", "PageHinkley"]

_DELTAS = (0.1, 0.03, 0.01, 2e-3, 5e-4, 1e-4, 1e-6, 1e-9)
_THRESHOLDS = (1.0, 2.0, 4.0, 8.0, 12.0, 18.0, 27.0, 40.0, 60.0)


class _Graded(ABC):
    def __init__(self, background: Background) -> None:
        fit = background.distance_N[background.fit_rows]
        self._value_N = (background.distance_N - fit.mean()) / fit.std()

    @abstractmethod
    def _detectors(self) -> Sequence[tuple[float, Any]]:
        """Return detectors that nothing was shown to yet, each with how strict it is."""

    def curve(self, trace: Trace) -> Doubles:
        """Return the strictest setting that has found a drift, [T]."""
        values = self._value_N[trace.rows].tolist()
        found = np.full(len(values), -np.inf)
        for grade, detector in self._detectors():
            for place, value in enumerate(values):
                detector.update(value)
                if detector.drift_detected:
                    found[place:] = np.maximum(found[place:], grade)
                    break
        return found


class Adwin(_Graded):
    """Adaptive windows (Bifet and Gavalda, 2007), checked at every request."""

    name = "ADWIN"

    def _detectors(self) -> Sequence[tuple[float, Any]]:
        drift = _river()
        return [(-np.log10(delta), drift.ADWIN(delta=delta, clock=1, grace_period=10)) for delta in _DELTAS]


class PageHinkley(_Graded):
    """Page's cumulative sum (1954), both ways, in deviations of a benign request."""

    name = "Page-Hinkley"

    def _detectors(self) -> Sequence[tuple[float, Any]]:
        drift = _river()
        return [(level, drift.PageHinkley(min_instances=20, threshold=level)) for level in _THRESHOLDS]


def _river() -> Any:
    try:
        from river import drift
    except ImportError as error:
        raise MissingExtraError("river", "extraction-bench") from error
    return drift

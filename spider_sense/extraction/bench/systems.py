"""Systems under comparison: each says at which request a stream is first alarmed.

Shape letters: N streams, T requests, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.bench.baselines import Background, Baseline, Trace
from spider_sense.extraction.bench.measure import thresholds_by_stratum
from spider_sense.extraction.simulator.traffic import Stream

__all__ = ["Alarm", "BaselineSystem", "System", "Tracer", "first_above"]

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Alarm:
    """The first alarm of a stream."""

    count: int
    """Requests up to it, itself included."""
    tier: str = ""
    limit: int | None = None
    """The same up to where something is done about the principal; None if nothing is."""


class System(Protocol):
    """A detector with its thresholds."""

    name: str

    def alarms(self, streams: Sequence[Stream]) -> list[Alarm | None]:
        """Return the first alarm of each stream, or None."""
        ...


@dataclass(frozen=True, eq=False)
class Tracer:
    """Makes what baselines read of a stream."""

    index: Mapping[str, int]
    """Row of each text."""
    unit_ND: Doubles
    """Vectors of the texts, of unit length."""

    def trace(self, stream: Stream) -> Trace:
        """Return one stream as a baseline reads it."""
        rows = np.array([self.index[request.text] for request in stream.requests], dtype=np.int64)
        times = np.array([request.time for request in stream.requests])
        return Trace(self.unit_ND[rows], times, rows)

    def background(self, fit: Sequence[Stream]) -> Background:
        """Return the innocent streams of the fit part as baselines read them."""
        traces = [self.trace(stream) for stream in fit]
        return Background(self.unit_ND, np.concatenate([trace.rows for trace in traces]), traces)


class BaselineSystem:
    """A baseline at the conformal threshold over the calibration part's principals, by stratum.

    Args:
        baseline: the method.
        tracer: of the embedding that it reads.
        calibration: innocent streams.
        alpha: lifetime false-alarm rate.
    """

    def __init__(self, baseline: Baseline, tracer: Tracer, calibration: Sequence[Stream], alpha: float) -> None:
        self.name, self._baseline, self._tracer = baseline.name, baseline, tracer
        highest = np.array([baseline.curve(tracer.trace(stream)).max() for stream in calibration])
        self._thresholds = thresholds_by_stratum(highest, [stream.tenant for stream in calibration], alpha)

    def alarms(self, streams: Sequence[Stream]) -> list[Alarm | None]:
        """Return the first alarm of each stream, or None."""
        found = []
        for stream in streams:
            threshold = self._thresholds.get(stream.tenant, self._thresholds[""])
            count = first_above(self._baseline.curve(self._tracer.trace(stream)), threshold)
            found.append(Alarm(count, limit=count) if count else None)
        return found


def first_above(curve_T: Doubles, threshold: float) -> int:
    """Return the number of the first request, from 1, whose statistic exceeds a threshold, or 0.

    A statistic that is not a number is no alarm: a stream that has ended says nothing.
    """
    above = np.flatnonzero(curve_T > threshold)
    return int(above[0]) + 1 if len(above) else 0

"""What many principals cost: bytes, updates a second on one core, and the time of one update."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from spider_sense.extraction.detector import Detector
from spider_sense.extraction.event import Event, EventBatch
from spider_sense.extraction.state import PrincipalState, fresh
from spider_sense.extraction.tiers import TieredDetector

__all__ = ["load_figures"]

_BATCH = 256
_BATCHES, _SINGLES = 40, 1000


def load_figures(detector: TieredDetector, events: Sequence[Event], principals: int) -> dict[str, Any]:
    """Return bytes a principal, updates a second in batches and alone, and quantiles of the time of one.

    Args:
        detector: fitted and calibrated.
        events: of many principals; they are sent again under other names.
        principals: whose states are held in memory.
    """
    states_N = fresh(list(range(1, principals + 1)))
    generator = np.random.default_rng(0)
    batches = [
        (generator.choice(principals, min(_BATCH, principals), replace=False), _batch(events, generator, principals))
        for _ in range(_BATCHES)
    ]
    names = [str(place) for place in range(_BATCH)]
    begin = time.perf_counter()
    for rows, batch in batches:
        states_N[rows], _ = detector.step(states_N[rows], batch, names)
    batched = sum(len(rows) for rows, _ in batches) / (time.perf_counter() - begin)
    seconds = _singles(detector, events, generator)
    return {
        "bytes_per_principal": PrincipalState.SIZE,
        "principals": principals,
        "updates_per_second": round(batched),
        "single_updates_per_second": round(1 / float(np.mean(seconds))),
        "update_ms_median": round(1000 * float(np.median(seconds)), 3),
        "update_ms_p99": round(1000 * float(np.quantile(seconds, 0.99)), 3),
    }


def _batch(events: Sequence[Event], generator: np.random.Generator, principals: int) -> EventBatch:
    return EventBatch.of([events[index] for index in generator.integers(len(events), size=min(_BATCH, principals))])


def _singles(detector: Detector, events: Sequence[Event], generator: np.random.Generator) -> list[float]:
    states = [detector.open(f"principal {place}") for place in range(50)]
    seconds = []
    for _ in range(_SINGLES):
        place, event = int(generator.integers(len(states))), events[int(generator.integers(len(events)))]
        begin = time.perf_counter()
        states[place], _ = detector.update(states[place], event)
        seconds.append(time.perf_counter() - begin)
    return seconds

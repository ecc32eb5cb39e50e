"""Events: what is refused, and how they are packed."""

from typing import Any

import numpy as np
import pytest

from spider_sense.errors import DataError
from spider_sense.extraction import Event, EventBatch
from spider_sense.extraction.event import rounds
from spider_sense.extraction.layout import SKETCH

SKETCHED = np.ones(SKETCH, dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"principal": ""}, "no principal"),
        ({"time": float("nan")}, "seconds since the epoch"),
        ({"time": 1767225600000.0}, "seconds since the epoch"),
        ({"tenant": "caf\u00e9"}, "ASCII"),
        ({"tenant": "x" * 25}, "at most 24"),
        ({"known_list": 8}, "allowed are -1 to 7"),
        ({"sketch": SKETCHED[:9]}, r"shape \[9\]"),
        ({"sketch": SKETCHED * np.float32(np.nan)}, "not finite"),
        ({"probes": np.ones(9, dtype=np.float32)}, r"shape \[9\]"),
        ({"max_tokens": -1}, "max_tokens of an event"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"choices": 0}, "choices of an event of 'a' are 0; give 1 to 65536"),
        ({"choices": 2**16 + 1}, "choices of an event"),
        ({"biased": (5, -3)}, "biases the token -3"),
    ],
)
def test_bad_numbers_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Event(**{"principal": "a", "time": 0.0, **change})


def test_a_batch_marks_what_was_not_seen() -> None:
    seen = Event(principal="a", time=1.0, sketch=SKETCHED, probes=np.array([2.0], dtype=np.float32))
    batch = EventBatch.of([seen, Event(principal="b", time=2.0)])
    assert np.isfinite(batch.sketch).all(axis=1).tolist() == [True, False]
    assert batch.probes[0].tolist() == [2.0] + [0.0] * 7
    assert np.isnan(batch.probes[1]).all()
    assert len(batch) == 2


def test_rounds_take_one_event_of_each_stream_that_goes_on() -> None:
    streams = [[Event(principal=name, time=float(turn)) for turn in range(n)] for name, n in (("a", 3), ("b", 1))]
    assert [(count, batch.time.tolist()) for count, batch in rounds(streams)] == [
        (2, [0.0, 0.0]),
        (1, [1.0]),
        (1, [2.0]),
    ]
    assert list(rounds([])) == []

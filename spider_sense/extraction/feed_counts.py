"""What becomes of the requests that a feed is offered, counted for the metrics."""

import threading
from collections import Counter, deque
from collections.abc import Iterable
from typing import Literal, TypedDict

from spider_sense.extraction.decision import Decision

__all__ = ["Fate", "FeedCounts", "FeedNote"]

_KEPT = 65_536
"""Decisions and times that are kept for a note that nobody takes, the latest ones."""

Fate = Literal["folded", "dropped", "failed"]
"""folded: committed. dropped: the queue was full. failed: the detector or the store did not take it."""


class FeedNote(TypedDict):
    """What was counted since the last note."""

    requests: dict[str, int]
    """By fate."""
    decisions: list[tuple[str, str]]
    """Level and tier of each."""
    store_errors: int
    seconds: list[float]
    """From the offer to the commit, of each request."""
    waiting: int
    """Requests in the queue now."""


class FeedCounts:
    """Counts, from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.totals: Counter[str] = Counter()
        """Since the start: requests by fate, and ``store_errors``."""
        self._told: Counter[str] = Counter()
        self._decisions: deque[tuple[str, str]] = deque(maxlen=_KEPT)
        self._seconds: deque[float] = deque(maxlen=_KEPT)
        self._waiting = 0

    def add(self, what: Fate | Literal["store_errors"], number: int = 1) -> None:
        """Count."""
        with self._lock:
            self.totals[what] += number

    def decided(self, decisions: Iterable[Decision]) -> None:
        """Count what was decided."""
        with self._lock:
            self._decisions += [(decision.level, decision.tier) for decision in decisions]

    def took(self, seconds: Iterable[float], waiting: int) -> None:
        """Note how long requests took, and how many still wait."""
        with self._lock:
            self._seconds += seconds
            self._waiting = waiting

    def take(self) -> FeedNote | None:
        """Return what has been counted since the last call, None if nothing."""
        with self._lock:
            new = self.totals - self._told
            if not new and not self._seconds:
                return None
            self._told = self.totals.copy()
            errors = new.pop("store_errors", 0)
            note = FeedNote(
                requests=dict(new),
                decisions=list(self._decisions),
                store_errors=errors,
                seconds=list(self._seconds),
                waiting=self._waiting,
            )
            self._decisions.clear()
            self._seconds.clear()
            return note

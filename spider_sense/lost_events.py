"""Events that the audit log did not take: counted for the metrics, and said now and then."""

import logging
import math
import time

__all__ = ["LostEvents"]

_LOG = logging.getLogger(__name__)
_SAID_EVERY = 60.0
"""Seconds. A disk that is full refuses an event of every request."""


class LostEvents:
    """Counts, for an engine that a log which fails must not end."""

    def __init__(self) -> None:
        self._untold = self._unsaid = 0
        self._said = -math.inf

    def add(self, error: OSError) -> None:
        """Count an event, and say why it was lost."""
        self._untold, self._unsaid = self._untold + 1, self._unsaid + 1
        now = time.monotonic()
        if now - self._said >= _SAID_EVERY:
            _LOG.error(
                "the audit log did not take %d events (%s), and what is not recorded is stopped; let it have room on "
                "its disk",
                self._unsaid,
                error,
            )
            self._unsaid, self._said = 0, now

    def take(self) -> int:
        """Return how many were lost since the last call."""
        untold, self._untold = self._untold, 0
        return untold

"""Principals that lost a request, and when."""

import math
import threading
from collections import OrderedDict

__all__ = ["Losses"]

_REMEMBERED = 1 << 16
"""Principals at most, those of the latest losses."""


class Losses:
    """Remembers losses until something that was offered later has been folded; several threads may call it."""

    def __init__(self) -> None:
        self._offered: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._offered

    def lost(self, name: str, offered: float) -> None:
        """Note that a request was lost which was offered at a moment of ``time.monotonic``."""
        with self._lock:
            self._offered[name] = max(offered, self._offered.pop(name, offered))
            # Names are the clients' own, and most never come again.
            if len(self._offered) > _REMEMBERED:
                self._offered.popitem(last=False)

    def folded(self, name: str, offered: float) -> None:
        """Forget a loss if what was folded was offered after it: a request that had waited makes up for nothing."""
        with self._lock:
            if self._offered.get(name, math.inf) < offered:
                del self._offered[name]

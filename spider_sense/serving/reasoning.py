"""Principals whose answers are given without their reasoning, in one process that answers clients."""

import time
from collections.abc import Callable, Iterable

__all__ = ["Hush"]


class Hush:
    """Remembers who is to be answered without reasoning.

    Args:
        seconds: how long, from the latest request that asked for it.
        clock: seconds, of a clock that never goes back.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}
        self.follow(seconds)

    def follow(self, seconds: float | None) -> None:
        """Let it last so long from now on; None answers everybody in full."""
        if seconds is None:
            self._until = {}
            return
        self._seconds = seconds

    def add(self, principals: Iterable[str]) -> None:
        """Leave the reasoning out of the answers of some principals from now on."""
        now = self._clock()
        self._until = {name: until for name, until in self._until.items() if until > now}
        self._until |= dict.fromkeys(principals, now + self._seconds)

    def __contains__(self, principal: object) -> bool:
        return isinstance(principal, str) and self._until.get(principal, 0.0) > self._clock()

"""Principals that are slowed, in one process that answers clients."""

import math
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from spider_sense import policy
from spider_sense.errors import ConfigError, MissingExtraError
from spider_sense.serving.settings import KEY

if TYPE_CHECKING:
    from limits.aio.storage import Storage

__all__ = ["STORAGE", "Throttle"]

STORAGE = "SPIDER_SENSE_THROTTLE_STORAGE"
"""Environment variable, since its value may hold a password: where requests are counted, as a URI of the library
``limits``; unset, every process counts for itself."""


class Throttle:
    """Lets a throttled principal in at the pace of the policy, and everybody else at once.

    Args:
        rule: the pace.
        clock: seconds, of a clock that never goes back.

    Raises:
        MissingExtraError: if the library that counts is not installed.
        ConfigError: if the environment names a storage that cannot be used.
    """

    def __init__(self, rule: policy.Throttle, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            from limits import RateLimitItemPerSecond
            from limits.aio.strategies import MovingWindowRateLimiter
        except ImportError as error:
            raise MissingExtraError("limits", "serve") from error
        self._window, self._item, self._clock = MovingWindowRateLimiter(_storage()), RateLimitItemPerSecond, clock
        self._until: dict[str, float] = {}
        self.follow(rule)

    def follow(self, rule: policy.Throttle | None) -> None:
        """Go on at another pace, which counts anew; None lets everybody in."""
        if rule is None:
            self._until = {}
            return
        self._pace, self._lasts = self._item(rule.requests, rule.per_seconds, namespace=KEY), rule.for_seconds

    def slow(self, principals: Iterable[str]) -> None:
        """Slow some principals from now on."""
        now = self._clock()
        self._until = {name: until for name, until in self._until.items() if until > now}
        self._until |= dict.fromkeys(principals, now + self._lasts)

    async def wait(self, principal: str) -> int:
        """Return the seconds after which a principal may try again, 0 if its request is let in now, and counted."""
        left = self._until.get(principal, 0.0) - self._clock()
        if left <= 0 or await self._window.hit(self._pace, principal):
            return 0
        window = await self._window.get_window_stats(self._pace, principal)
        return max(1, math.ceil(min(left, window.reset_time - time.time())))


def _storage() -> "Storage":
    from limits.aio.storage import Storage
    from limits.errors import ConfigurationError
    from limits.storage import storage_from_string

    advice = "give one such as async+redis://HOST:6379, or unset it"
    try:
        storage = storage_from_string(os.environ.get(STORAGE, "async+memory://"))
    except ConfigurationError as error:
        raise ConfigError(f"{STORAGE}: {error}; {advice}") from error
    if not isinstance(storage, Storage):
        raise ConfigError(f"{STORAGE}: {type(storage).__name__} would hold up everybody while it is asked; {advice}")
    return storage

"""Principals whose answers are given without their reasoning, in one process that answers clients."""

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from spider_sense.serving.door import PRINCIPAL

__all__ = ["HUSH", "Hush", "hushed_chat"]

HUSH = "_spider_sense_hush"
"""Attribute of an engine's client that holds its ``Hush``, or None."""


class Hush:
    """Remembers who is to be answered without reasoning.

    Args:
        seconds: how long, from the latest request that asked for it.
        clock: seconds, of a clock that never goes back.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._until: dict[str, float] = {}

    def add(self, principals: Iterable[str]) -> None:
        """Leave the reasoning out of the answers of some principals from now on."""
        now = self._clock()
        self._until = {name: until for name, until in self._until.items() if until > now}
        self._until |= dict.fromkeys(principals, now + self._seconds)

    def __contains__(self, principal: object) -> bool:
        return isinstance(principal, str) and self._until.get(principal, 0.0) > self._clock()


async def hushed_chat(
    original: Callable[..., Awaitable[Any]], serving: Any, request: Any, *args: Any, **options: Any
) -> Any:
    """Answer a chat request, without the reasoning if that is what its principal has come to.

    Args:
        original: answers.
        serving: vLLM's ``OpenAIServingChat``.
        request: the client's.
        args: passed on.
        options: passed on.
    """
    hush: Hush | None = getattr(getattr(serving.engine_client, "engine_core", None), HUSH, None)
    if hush is not None and PRINCIPAL.get() in hush:
        # As a client may ask for itself; vLLM then holds back the tokens and log-probabilities of the reasoning too.
        request.include_reasoning = False
    return await original(request, *args, **options)

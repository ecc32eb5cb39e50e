"""Principals whose answers are given without their reasoning, in one process that answers clients."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["BATCH", "CHAT", "RESPONSES", "Hush"]

CHAT: Mapping[str, Any] = {"include_reasoning": False}
"""Fields of vLLM's request whose answer is to leave the reasoning out, as a client may ask for itself; vLLM then holds
back the tokens and log-probabilities of the reasoning too."""
BATCH = {**CHAT, "logprobs": False, "top_logprobs": 0, "logprob_token_ids": None, "return_token_ids": False}
"""The same of several conversations at once, where vLLM would not hold them back."""
RESPONSES = {**CHAT, "enable_response_messages": False}
"""The same of ``/v1/responses``, whose messages would hold all tokens as they came."""


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

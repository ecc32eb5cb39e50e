"""A step of an engine on its way: which requests it runs, and the rows of each.

Shape letters: T packed rows, B requests of a step.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spider_sense.case import Case
from spider_sense.judge import Reading
from spider_sense.scoring import Request, TokenChain

__all__ = ["NO_END", "RunningRequest", "Step"]

NO_END = 1 << 62
"""Length of a prompt that never ends: every row of such a request is a prompt row."""


@dataclass(slots=True)
class RunningRequest:
    """A request that the engine runs."""

    case: Case
    tokens: list[int]
    """Prompt and accepted tokens."""
    blocks: list[int]
    chain: TokenChain | None
    cached: int = 0
    """Tokens before its next row that come from cached blocks whose state it has not taken over yet."""
    again: Request | None = None
    """After a preemption: the state of tokens that are computed a second time, for the sake of their blocks alone."""

    def goes_on(self, position: int) -> bool:
        """Return whether a position is the next to fold and past the prompt, with nothing owed before it."""
        request = self.case.request
        fresh = position == request.position and not self.cached and self.again is None
        return fresh and position >= request.prompt_length and position >= request.skip


@dataclass(slots=True)
class Step:
    """A step."""

    total: int = 0
    """Packed rows T."""
    drafts: Mapping[str, int] = field(default_factory=dict)
    """Rows of each request, its last ones, whose tokens may be rejected."""
    running: list[RunningRequest] = field(default_factory=list)
    """Requests in the order of their rows."""
    start_B: Sequence[int] = ()
    """First row of each, and the end of the last; B + 1 numbers."""
    position_B: Sequence[int] = ()
    """Absolute position of each one's first row."""
    reading: Reading | None = None
    seconds: float = 0.0
    """That folding took."""

    def decoding(self) -> np.ndarray:
        """Return the places of the requests of which it computes one token each, the next one of an answer."""
        one = np.flatnonzero(np.diff(self.start_B) == 1).tolist()
        return np.array([place for place in one if self.running[place].goes_on(self.position_B[place])], dtype=np.int64)

    def rows(self, places: Iterable[int] | None = None) -> Iterator[tuple[RunningRequest, np.ndarray, np.ndarray]]:
        """Yield each request, or those at some places, with its rows and their absolute positions."""
        for place in range(len(self.running)) if places is None else places:
            rows = np.arange(self.start_B[place], self.start_B[place + 1])
            yield self.running[place], rows, rows - self.start_B[place] + self.position_B[place]

    def sure(self, running: RunningRequest, rows: np.ndarray) -> int:
        """Return how many rows of a request are certain before anything is sampled."""
        return len(rows) - self.drafts.get(running.case.request.id, 0)

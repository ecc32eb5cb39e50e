"""What a detector of extraction does, for the stores, feeds and harnesses around it."""

from typing import Protocol

from spider_sense.extraction.decision import Decision
from spider_sense.extraction.event import Event
from spider_sense.extraction.state import PrincipalState

__all__ = ["Detector"]


class Detector(Protocol):
    """Pure and deterministic: a state and an event give the next state and what is newly decided."""

    def open(self, principal: str) -> PrincipalState:
        """Return the state of a principal that was never seen."""
        ...

    def update(self, state: PrincipalState, event: Event) -> tuple[PrincipalState, tuple[Decision, ...]]:
        """Return the next state and the decisions that this event brought about; ``state`` is not changed."""
        ...

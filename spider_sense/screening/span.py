"""Spans: which tokens of a conversation belong to which stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spider_sense.screening.stage import Stage

__all__ = ["Conversation", "Span"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive tokens of one stage: the content alone, without what the template writes around it."""

    stage: Stage
    """What the template's markers say, but for a message that another agent sent: that is an observation, whatever
    its role."""
    start: int
    """Absolute position of the first token."""
    stop: int
    """Absolute position after the last token; an empty span has ``stop == start``."""
    role: str
    """As the template names it: ``user``, ``assistant``, ``tool``, ``ipython``."""
    message: int | None = None
    """Place of the message among those that were rendered, from 0; None if spans were read from token ids alone."""
    call: int | None = None
    """Place among the tool calls of its message, from 0; None unless an action."""
    tool: str | None = None
    """Of an action the tool that is called, of an observation the tool that answers, where known."""
    arguments: Mapping[str, Any] | None = None
    """Of an action; None if they cannot be read, which nothing may take for harmless."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a span cannot go from {self.start} to {self.stop}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation as the server renders it, cut into stages."""

    ids: tuple[int, ...]
    """Token ids, S of them."""
    spans: tuple[Span, ...]
    """In ascending order and disjoint. What the operator wrote (a system message) belongs to none."""
    texts: tuple[str, ...]
    """What each span's tokens read as, one for each span; of an empty span, what the template left out there."""

    def __post_init__(self) -> None:
        if len(self.spans) != len(self.texts):
            raise ValueError(f"there are {len(self.spans)} spans and {len(self.texts)} texts")
        ends = [0, *(end for span in self.spans for end in (span.start, span.stop)), len(self.ids)]
        if ends != sorted(ends):
            raise ValueError(f"spans overlap, are out of order, or reach beyond {len(self.ids)} tokens")

"""How the parts of screening meet: whatever has these methods can stand in for another.

Shape letters: D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from spider_sense.screening.artifact import Artifact
from spider_sense.screening.message import Message
from spider_sense.screening.sensed import Sensed
from spider_sense.screening.span import Conversation
from spider_sense.screening.verdict import Answer, Match

__all__ = ["Judge", "Matcher", "Sense", "SpanReader"]


class SpanReader(Protocol):
    """Renders a conversation as the server does and finds the stages in it."""

    def read(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """Render and cut.

        Args:
            messages: a whole conversation, in order.
            tools: JSON schemas of the tools, as in a request.

        Raises:
            ConfigError: if the template cannot render it, or its stages cannot be told apart.
        """
        ...


class Sense(Protocol):
    """Runs a conversation through the served model once and says what its probes make of each span."""

    def sense(self, conversation: Conversation) -> Sequence[Sensed]:
        """Return one for each span, in order."""
        ...


class Matcher(Protocol):
    """A bank of signatures."""

    def match(self, pooled_D: Tensor) -> Sequence[Match]:
        """Return the signatures that fire on an activation, nearest first."""
        ...


class Judge(Protocol):
    """Whoever is asked about what is suspect."""

    def ask(self, artifact: Artifact) -> Answer:
        """Judge one artifact; trouble is an answer without an outcome, never an exception."""
        ...

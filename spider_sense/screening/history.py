"""What of a growing conversation has been screened, and what the model may see of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spider_sense.errors import RejectedError
from spider_sense.screening.message import Message
from spider_sense.screening.screen import Screen
from spider_sense.screening.verdict import Screening, StageVerdict

__all__ = ["Approve", "History"]

Approve = Callable[[StageVerdict], bool]
"""Asks a person about a verdict that needs one; True lets it pass."""


class History:
    """The screened part of one conversation; what was decided is not decided again.

    Args:
        screen: decides.
        principal: whose agent it is.
        approve: asks a person; without one, what needs a person is rejected.
    """

    def __init__(self, screen: Screen, principal: str | None = None, approve: Approve | None = None) -> None:
        self._screen, self._principal, self._approve = screen, principal, approve
        self._seen: list[Message] = []
        self._clean: list[Message] = []
        self.screenings: list[Screening] = []
        """All decisions so far, the newest last."""

    def take(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[Message]:
        """Screen what is new of a conversation.

        Args:
            messages: all of it. If it begins neither with what was seen nor with what came of that, all of it is new.
            tools: JSON schemas of the tools that the model was offered; None if that is not known.

        Returns:
            The conversation with notices in place of what was sanitised.

        Raises:
            RejectedError: if a new message is rejected; it is not taken for seen.
            ConfigError: if the conversation cannot be rendered.
        """
        # A loop goes on with what it sent or with what it was given back.
        head = list(messages[: len(self._seen)])
        known = len(head) if head in (self._seen, self._clean) else 0
        clean = [*self._clean[:known], *messages[known:]]
        if known < len(messages):
            screening = self._screen.check(clean, tools, self._principal, since=known)
            self.screenings.append(screening)
            self._check(screening)
            clean = self._screen.sanitised(clean, screening)
        self._seen, self._clean = list(messages), clean
        return clean

    def _check(self, screening: Screening) -> None:
        for verdict in screening.verdicts:
            if verdict.outcome != "reject":
                continue
            if not (verdict.needs_human and self._approve is not None and self._approve(verdict)):
                raise RejectedError(verdict.stage, verdict.evidence)

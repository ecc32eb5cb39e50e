"""What is screened: a span, its text, and whose it is."""

from dataclasses import dataclass

from spider_sense.screening.span import Span
from spider_sense.screening.stage import Stage

__all__ = ["Artifact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One span before the cascade."""

    span: Span
    text: str
    """Untrusted; data to be judged."""
    principal: str | None = None
    """Whose conversation it is."""
    sender: str | None = None
    """The agent that sent it, by a verified envelope."""
    purpose: str = ""
    """What the user asked for last, so that a judge can tell a task from a hijacked one. Untrusted as well."""

    @property
    def stage(self) -> Stage:
        """The span's."""
        return self.span.stage

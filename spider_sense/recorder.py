"""Writes what happens to requests into the audit log.

Where an engine counts the events that the log does not take, a request of which nothing is recorded is stopped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spider_sense.audit import AuditEvent, AuditLog, EventKind
from spider_sense.case import Case
from spider_sense.decision import Decision
from spider_sense.lost_events import LostEvents

__all__ = ["UNRECORDED", "Recorder"]

UNRECORDED = Decision(action="stop", verdict=None, reason="it could not be recorded: what is not recorded is stopped")


class Recorder:
    """Records requests, and counts what could not be recorded.

    Args:
        audit: where to record; None records nothing.
        lost: counts the events that ``audit`` does not take; None lets the log's error through.
    """

    def __init__(self, audit: AuditLog | None, lost: LostEvents | None = None) -> None:
        self._audit, self._lost = audit, lost
        self.guard = ""
        """Digest of the guard that scores from now on."""

    @property
    def keeps_text(self) -> bool:
        """Whether the log was asked to keep prompts."""
        return self._audit is not None and self._audit.include_text

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Record nothing meanwhile."""
        audit, self._audit = self._audit, None
        try:
            yield
        finally:
            self._audit = audit

    def record(self, case: Case, kind: EventKind, decision: Decision | None = None, text: str | None = None) -> bool:
        """Record an event.

        Args:
            case: the request.
            kind: what happened to it.
            decision: what was decided about it, if something was.
            text: its prompt, which the log drops unless it was asked to keep it.

        Returns:
            Whether the log has it, or there is none.

        Raises:
            OSError: if the log does not take it and nobody counts that.
        """
        if self._audit is None:
            return True
        try:
            self._audit.write(self._event(case, kind, decision, text))
        except OSError as error:
            if self._lost is None:
                raise
            self._lost.add(error)
            return False
        return True

    def decided(self, case: Case, kind: EventKind, decision: Decision) -> Decision:
        """Record a decision, and return the one that holds: a request of which nothing is recorded is stopped."""
        recorded = self.record(case, kind, decision)
        return decision if recorded or decision.action == "stop" else UNRECORDED

    def take_lost(self) -> int:
        """Return how many events the log did not take since the last call."""
        return 0 if self._lost is None else self._lost.take()

    def _event(self, case: Case, kind: EventKind, decision: Decision | None, text: str | None) -> AuditEvent:
        about: dict[str, Any] = {}
        if decision is not None:
            about = {"action": decision.action, "reason": decision.reason}
            if decision.verdict is not None:
                fields = ("detector", "zone", "score", "threshold")
                about |= {name: getattr(decision.verdict, name) for name in fields}
        return AuditEvent(
            request=case.request.id,
            principal=case.request.principal,
            event=kind,
            position=case.position,
            coverage=case.coverage,
            guard=self.guard,
            patched_from=case.patched_from,
            text=text,
            **about,
        )

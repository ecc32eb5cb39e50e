"""What operators took back: a review that finds no more than that lets it rest."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from pydantic import TypeAdapter

from spider_sense.extraction.decision import LEVELS, Decision
from spider_sense.extraction.standing import parsed

__all__ = ["Cleared", "cleared", "cleared_of", "marked", "record_of", "uncovered"]

GROWN = 2
"""How many times as many requests are more than what a rule found before."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """A finding that an operator took back."""

    finding: Decision
    time: float
    """When, in seconds since the epoch."""

    def covers(self, found: Decision) -> bool:
        """Return whether a finding is no more than this one: of the same tier, about one account or a group as this
        was, and neither of a higher level, a higher score nor more accounts. What rules find has a score that does not
        grow; the requests count instead."""
        seen = self.finding
        return (
            (found.tier, found.accounts > 1) == (seen.tier, seen.accounts > 1)
            and LEVELS.index(found.level) <= LEVELS.index(seen.level)
            and found.score <= seen.score
            and found.accounts <= seen.accounts
            and (found.tier != "rule" or found.count < GROWN * seen.count)
        )

    @property
    def date(self) -> str:
        """When, in UTC, to the minute."""
        return datetime.fromtimestamp(self.time, UTC).strftime("%Y-%m-%d %H:%M")


_RECORD = TypeAdapter(tuple[Cleared, ...])


def record_of(clears: Iterable[Cleared]) -> str:
    """Return a principal's clears as a store keeps them: without the names of others; empty for none."""
    kept = [asdict(replace(each, finding=replace(each.finding, group=()))) for each in clears]
    return json.dumps(kept) if kept else ""


def cleared_of(text: str) -> tuple[Cleared, ...]:
    """Return the clears that a store kept.

    Raises:
        StateError: if they are damaged.
    """
    return parsed(text, _RECORD, "clear")


def cleared(before: Iterable[Cleared], found: Iterable[Decision], time: float) -> tuple[Cleared, ...]:
    """Return the clears of a principal once its findings are taken back, at a time in seconds since the epoch."""
    new = tuple(Cleared(finding, time) for finding in found)
    return (*(old for old in before if not any(each.covers(old.finding) for each in new)), *new)


def uncovered(found: Iterable[Decision], clears: Mapping[str, Iterable[Cleared]]) -> list[Decision]:
    """Return the findings that no clear of their principal covers."""
    return [one for one in found if not any(each.covers(one) for each in clears.get(one.principal, ()))]


def marked(found: Iterable[Decision], clears: Mapping[str, Iterable[Cleared]]) -> tuple[Decision, ...]:
    """Return the findings; those that are covered say so in their evidence."""

    def said(one: Decision) -> Decision:
        dates = [each.date for each in clears.get(one.principal, ()) if each.covers(one)]
        return replace(one, evidence=(*one.evidence, f"cleared by an operator, {dates[-1]}")) if dates else one

    return tuple(map(said, found))

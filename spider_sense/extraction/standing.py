"""How a principal stands: what the detector has found so far, as it is kept beside its state and told to the policy."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from spider_sense.errors import StateError
from spider_sense.extraction.decision import LEVELS, Decision, Level

__all__ = ["CLEAR", "Standing", "decision_of", "strictest", "text_of"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What the policy hears of whoever sends a request."""

    level: Level | Literal["clear", "unknown"]
    """unknown: it cannot be told, since the feed is down or an event of this principal was lost."""
    reason: str = ""
    """For the operator: which tier found it, or why nothing is known."""


CLEAR = Standing("clear")
_DECISION = TypeAdapter(Decision)


def text_of(decision: Decision) -> str:
    """Return a decision as a store keeps it: without the names of others, which their own erasure would not reach."""
    return json.dumps(asdict(replace(decision, group=())))


def decision_of(text: str) -> Decision:
    """Return the decision that a store kept.

    Raises:
        StateError: if it is damaged.
    """
    try:
        return _DECISION.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StateError(
            f"{text[:40]!r} is no standing that a store kept ({place}: {first['msg']}); clear its principal"
        ) from error


def strictest(decisions: Iterable[Decision]) -> Decision | None:
    """Return the decision of the highest level; None of none.

    Of several it is the last of the rules, which names all that rules find, and without one the first.
    """
    found = list(decisions)
    ranks = [LEVELS.index(decision.level) for decision in found]
    highest = [decision for decision, rank in zip(found, ranks, strict=True) if rank == max(ranks)]
    rules = [decision for decision in highest if decision.tier == "rule"]
    return next(iter([*rules[-1:], *highest]), None)

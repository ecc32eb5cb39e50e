"""A whole log judged at once: every principal's decisions, and how they came about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.decision import LEVELS, TIERS, Decision
from spider_sense.extraction.event import Event, EventBatch
from spider_sense.extraction.groups import Group, linked
from spider_sense.extraction.layout import States
from spider_sense.extraction.review import review
from spider_sense.extraction.state import PrincipalState
from spider_sense.extraction.tiers import TieredDetector
from spider_sense.extraction.tracker import walk

__all__ = ["Ruling", "judge"]


@dataclass(frozen=True, slots=True, eq=False)
class Ruling:
    """What a log shows."""

    states: Mapping[str, PrincipalState]
    """Of each principal, after its last request."""
    trails: Mapping[str, NDArray[np.float64]]
    """Running maxima of own history and level after each request, [T, 2]."""
    decisions: tuple[Decision, ...]
    """In the order of the requests, then those of the review."""
    groups: tuple[Group, ...]

    def highest(self) -> dict[str, list[Decision]]:
        """Return each principal's findings of its highest level, the highest principals first: one of each tier, alone
        and together with others, rules first; of rules the last, which names all that they find."""
        found: dict[str, dict[tuple[int, bool], Decision]] = {}
        for decision in self.decisions:
            held = found.setdefault(decision.principal, {})
            rank, known = LEVELS.index(decision.level), next(iter(held.values()), decision)
            if rank > LEVELS.index(known.level):
                held.clear()
            if rank >= LEVELS.index(known.level):
                place = TIERS.index(decision.tier), bool(decision.group)
                held[place] = decision if decision.tier == "rule" else held.get(place, decision)
        ordered = {name: [held[place] for place in sorted(held)] for name, held in found.items()}
        return dict(sorted(ordered.items(), key=lambda item: (-LEVELS.index(item[1][0].level), item[0])))

    def worst(self) -> dict[str, Decision]:
        """Return the first of each principal's highest findings."""
        return {name: findings[0] for name, findings in self.highest().items()}


def judge(detector: TieredDetector, streams: Mapping[str, Sequence[Event]]) -> Ruling:
    """Carry every principal through its events, then review them together.

    Args:
        detector: calibrated, or nothing but rules is more than watched.
        streams: events in the order of time, by principal.
    """
    names = list(streams)
    trails = {name: np.full((len(stream), 2), np.nan) for name, stream in streams.items()}
    decisions: list[Decision] = []
    turn = 0

    def step(rows: NDArray[np.int64], states: States, batch: EventBatch) -> States:
        nonlocal turn
        states, found = detector.step(states, batch, [names[row] for row in rows])
        for row, own, level in zip(rows, states["own"], states["level"], strict=True):
            trails[names[row]][turn] = own, level
        decisions.extend(found)
        turn += 1
        return states

    states_N = walk(list(streams.values()), detector.key, step)
    states = {name: PrincipalState(states_N[row : row + 1]) for row, name in enumerate(names)}
    reviewed = review(detector, states)
    return Ruling(states, trails, (*decisions, *reviewed), tuple(linked(states, detector.population)))

"""A whole log judged at once: every principal's decisions, and how they came about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.decision import LEVELS, Decision
from spider_sense.extraction.event import Event, EventBatch
from spider_sense.extraction.groups import Group, linked
from spider_sense.extraction.layout import States
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

    def worst(self) -> dict[str, Decision]:
        """Return each principal's highest finding, the first of several, the highest principals first."""
        found: dict[str, Decision] = {}
        for decision in self.decisions:
            held = found.get(decision.principal)
            if held is None or LEVELS.index(decision.level) > LEVELS.index(held.level):
                found[decision.principal] = decision
        return dict(sorted(found.items(), key=lambda item: (-LEVELS.index(item[1].level), item[0])))


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
    reviewed = detector.review(states)
    return Ruling(states, trails, (*decisions, *reviewed), tuple(linked(states, detector.population)))

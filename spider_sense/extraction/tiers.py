"""The detector: rules, own history, level, and linked groups, with the error budget split over them.

Shape letters: N principals, T requests of the longest stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.decision import LEVELS, TIERS, Decision, Level, Tier
from spider_sense.extraction.event import Event, EventBatch
from spider_sense.extraction.features import looks
from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import States
from spider_sense.extraction.population import Population
from spider_sense.extraction.rules import Rules
from spider_sense.extraction.state import PrincipalState
from spider_sense.extraction.thresholds import Calibration
from spider_sense.extraction.tracker import Tracker, walk
from spider_sense.extraction.words import level_words, own_words

__all__ = ["Replay", "TieredDetector"]

WATCH = 0.05
"""Share of honest principals whose level may ever be watched."""
_RULE, _OWN, _LEVEL = (TIERS.index(tier) for tier in ("rule", "own", "level"))


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """The tiers' running maxima along N streams; NaN after a stream's end."""

    own_NT: NDArray[np.float64]
    level_NT: NDArray[np.float64]
    rule_NT: NDArray[np.float64]
    """0 nothing, 1 watch, 3 act."""
    states: States
    """[N], after the last request."""


@dataclass(frozen=True, slots=True, eq=False)
class TieredDetector:
    """Implements ``Detector``; see there.

    Without a calibration nothing is more than watched, except for the rules.
    """

    population: Population
    calibration: Calibration | None
    key: Key
    width: int
    """Of the model's hidden state."""
    tracker: Tracker = field(init=False)
    rules: Rules = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracker", self.population.tracker(self.key))
        object.__setattr__(self, "rules", Rules(self.width))

    def open(self, principal: str) -> PrincipalState:
        """Return the state of a principal that was never seen."""
        return PrincipalState.open(self.key.seed(principal))

    def update(self, state: PrincipalState, event: Event) -> tuple[PrincipalState, tuple[Decision, ...]]:
        """Return the next state and the decisions that this event brought about."""
        states, decisions = self.step(state.states, EventBatch.of([event]), [event.principal])
        return PrincipalState(states), decisions

    def step(
        self, states_N: States, batch: EventBatch, principals: Sequence[str]
    ) -> tuple[States, tuple[Decision, ...]]:
        """Do the same for N principals with one request each."""
        states = self.advance(states_N, batch)
        found_N, decided = self.rules.found(states), states["decided"]
        levels_N4 = self.levels(states, found_N)
        fresh = levels_N4 > decided
        # What a rule finds hides no other: each is told when it is found first, whatever the level was before.
        fresh[:, _RULE] = found_N & ~decided[:, _RULE]
        states["decided"] = np.maximum(decided, levels_N4)
        states["decided"][:, _RULE] = decided[:, _RULE] | found_N
        decisions = [
            self.decision(states[row : row + 1], TIERS[tier], LEVELS[levels_N4[row, tier] - 1], principals[row])
            for row, tier in np.argwhere(fresh)
        ]
        return states, tuple(decisions)

    def advance(self, states_N: States, batch: EventBatch) -> States:
        """Return the states after one request each, with their running maxima; nothing is decided."""
        states = states_N.copy()
        self._carry(states, batch)
        return states

    def _carry(self, states: States, batch: EventBatch) -> None:
        """Advance in place."""
        self.tracker.advance(states, batch)
        looked = looks(states["count"]) & (states["sketched"] > 0)
        for count in np.unique(states["count"][looked]).tolist():
            rows = np.flatnonzero(looked & (states["count"] == count))
            model, features = self.population.reading(states[rows], count)
            if model is not None:
                scores = model.score(features)
                above = scores > states["level"][rows]
                states["level"][rows[above]], states["level_at"][rows[above]] = scores[above], count

    def replay(self, streams: Sequence[Sequence[Event]]) -> Replay:
        """Carry N streams, one principal each, through all their events.

        Raises:
            DataError: if a stream is empty or has two principals.
        """
        shape = len(streams), max(map(len, streams), default=0)
        own, level, rule = (np.full(shape, np.nan) for _ in range(3))
        turn = 0

        def step(rows: NDArray[np.int64], states: States, batch: EventBatch) -> States:
            nonlocal turn
            self._carry(states, batch)
            own[rows, turn], level[rows, turn] = states["own"], states["level"]
            rule[rows, turn] = self.rules.judge(states)
            turn += 1
            return states

        states = walk(streams, self.key, step)
        return Replay(own, level, rule, states)

    def threshold(self, tier: Tier, tenant: str, share: float | None = None) -> float:
        """Return a tier's threshold; infinity without a calibration."""
        return np.inf if self.calibration is None else self.calibration.threshold(tier, tenant, share)

    def levels(self, states_N: States, found_N: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the level of each tier, [N, 4]: 0 nothing, 1 watch, 2 limit, 3 act.

        Args:
            states_N: of the principals.
            found_N: what the rules find of them.
        """
        result = np.zeros((len(states_N), len(TIERS)), dtype=np.uint8)
        result[:, _RULE] = self.rules.levels(found_N)
        for name in np.unique(states_N["tenant"]):
            rows, tenant = states_N["tenant"] == name, bytes(name).decode("ascii")
            own, level = states_N["own"][rows], states_N["level"][rows]
            watched, limited = level > self.watch("level", tenant), level > self.threshold("level", tenant)
            result[rows, _LEVEL] = np.where(limited, 2, watched)
            # An honest turn to other work can look like a campaign's: alone it limits nobody.
            turned = (own > self.threshold("own", tenant)) & watched
            result[rows, _OWN] = np.where(turned, 2, own > self.watch("own", tenant))
        both = (result[:, _OWN] >= 2) & (result[:, _LEVEL] >= 2)
        for column in (_OWN, _LEVEL):
            result[both, column] = 3
        return result

    def watch(self, tier: Tier, tenant: str) -> float:
        """Return what own history or level must exceed to be watched."""
        if self.calibration is None:
            # Odds of 20, which nothing calibrates, and the 95th percentile of the principals that set the scale.
            return -np.log(WATCH) if tier == "own" else 1.0
        return self.calibration.threshold(tier, tenant, None if tier == "own" else WATCH)

    def decision(self, state_1: States, tier: Tier, level: Level, principal: str) -> Decision:
        """Say what a tier finds of one principal."""
        calibration, tenant = self.calibration, bytes(state_1["tenant"][0]).decode("ascii")
        count = int(state_1["count"][0])
        if tier == "rule":
            score, threshold, p_value, certified = float(LEVELS.index(level) + 1), 1.0, None, True
            evidence, stratum = self.rules.evidence(state_1, 0), ""
        else:
            score, stratum = float(state_1[tier][0]), tenant
            threshold = self.watch(tier, tenant) if level == "watch" else self.threshold(tier, tenant)
            p_value = None if calibration is None else calibration.p_value(tier, tenant, score)
            certified = calibration is not None and calibration.certified(tier, tenant, count)
            evidence = own_words(self.population, state_1) if tier == "own" else ()
            if tier == "level" or level != "watch":
                evidence += level_words(self.population, state_1)
            horizon = calibration.horizons.get(tenant, count) if calibration else count
            evidence += (f"calibration covers {horizon} requests, these are {count}",) if count > horizon else ()
        return Decision(
            principal=principal,
            level=level,
            tier=tier,
            score=score,
            threshold=threshold,
            p_value=p_value,
            count=count,
            time=float(state_1["last"][0]),
            stratum=stratum,
            certified=certified,
            evidence=evidence,
        )

"""A detector whose every decision is known beforehand."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sense.extraction import Decision, Event, Key, Level, PrincipalState
from spider_sense.extraction.feed import Feed
from spider_sense.extraction.observation import Asked, Observation
from spider_sense.extraction.settings import ExtractionSettings
from spider_sense.extraction.stores import Store, open_store

KEY = Key(b"sixteen bytes at least")


class Counting:
    """Decides by the number of a principal's requests: one is watched, three are limited, five are acted on."""

    LEVELS: Mapping[int, Level] = {1: "watch", 3: "limit", 5: "act"}

    def __init__(self) -> None:
        self.events: list[Event] = []

    def open(self, principal: str) -> PrincipalState:
        return PrincipalState.open(KEY.seed(principal))

    def update(self, state: PrincipalState, event: Event) -> tuple[PrincipalState, tuple[Decision, ...]]:
        if event.principal == "breaks the detector":
            raise ZeroDivisionError
        self.events.append(event)
        states = state.states.copy()
        states["count"] += 1
        level = self.LEVELS.get(int(states["count"][0]))
        return replace(state, states=states), () if level is None else (decision(event.principal, level),)


def decision(principal: str, level: Level, tier: Any = "own") -> Decision:
    return Decision(
        principal=principal,
        level=level,
        tier=tier,
        score=float("inf"),
        threshold=1.5,
        p_value=None,
        count=1,
        time=1000.0,
        stratum="",
        certified=True,
        evidence=("its requests changed",),
        group=("a", "b"),
    )


def plain(seen: Observation, party: str | None) -> Event:
    if seen.principal == "cannot be read" or not seen.prompt:
        raise ValueError("no event")
    links = (("declared", KEY.hash("declared", party)),) if party else ()
    return Event(principal=seen.principal, time=seen.time, links=links)  # type: ignore[arg-type]


def seen(principal: str) -> Observation:
    return Observation(principal=principal, prompt=(1, 2, 3), asked=Asked(), reading=lambda: np.zeros(64, np.float32))


@pytest.fixture
def helpers() -> Any:
    """The functions of this file."""
    return __import__("types").SimpleNamespace(
        Counting=Counting, KEY=KEY, decision=decision, plain=plain, seen=seen, settings=settings
    )


def settings(**changes: Any) -> ExtractionSettings:
    fields = {"detector": "none", "key": "none", "store": "none", "flush_seconds": 0.02, "refresh_seconds": 0.05}
    return ExtractionSettings.model_validate(fields | changes, strict=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "principals.sqlite"))


@pytest.fixture
def feed(store: Store) -> Iterator[Callable[..., Feed]]:
    """Return a function that makes feeds into the store, or into another one."""
    made: list[Feed] = []

    def make(into: Any = None, detector: Any = None, **changes: Any) -> Feed:
        made.append(Feed(into or store, detector or Counting(), plain, settings(**changes)))
        return made[-1]

    yield make
    for one in made:
        one.close(1.0)

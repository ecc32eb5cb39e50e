"""Streams of made-up principals: every one has a mean of its own, and its requests scatter around it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from spider_sense.extraction import Event, Key, PrincipalState
from spider_sense.extraction.layout import PROBES, SKETCH, LinkKind
from spider_sense.extraction.population import Population
from spider_sense.extraction.thresholds import Budget, Calibration
from spider_sense.extraction.tiers import TieredDetector

KEY = Key(b"a key for tests, not a secret")
PROBE_NAMES = ("reasoning", "rubric", "synthesis", "exam", "agent", "code")
TEMPLATE = KEY.opening("Answer the following question and write down every step of your reasoning:")


def stream(
    name: str,
    seed: int,
    requests: int = 64,
    *,
    attack_from: int | None = None,
    share: float = 1.0,
    tenant: str = "",
    links: Sequence[tuple[LinkKind, int]] = (),
) -> list[Event]:
    """Return a principal's events; an attack moves probe 0 and three coordinates of a share of them by 4.

    Principals' means scatter with a standard deviation of 0.5, requests around them with 1.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.5, SKETCH + PROBES) + rng.normal(0, 1, (requests, SKETCH + PROBES))
    attacks = (np.arange(requests) >= (requests if attack_from is None else attack_from)) & (
        rng.random(requests) < share
    )
    for column in (0, 3, 40, SKETCH):
        x[attacks, column] += 4
    openings = [KEY.hash("opening", f"{name} {number}") for number in rng.integers(0, 40, requests)]
    return [
        Event(
            principal=name,
            time=1e9 + 60.0 * index,
            sketch=x[index, :SKETCH].astype(np.float32),
            probes=x[index, SKETCH : SKETCH + len(PROBE_NAMES)].astype(np.float32),
            tenant=tenant,
            opening=TEMPLATE if attacks[index] else openings[index],
            parameters=KEY.parameters({"temperature": int(rng.integers(5)) / 4}),
            links=tuple(links),
        )
        for index in range(requests)
    ]


def honest(count: int, first_seed: int = 0, requests: int = 64, tenant: str = "") -> list[list[Event]]:
    """Return streams of honest principals."""
    return [stream(f"honest{seed}", seed, requests, tenant=tenant) for seed in range(first_seed, first_seed + count)]


def attackers(count: int, first_seed: int = 100_000, requests: int = 64) -> list[list[Event]]:
    """Return streams of attackers from the first request, at several mixtures with honest traffic."""
    shares = (1.0, 0.5, 0.25)
    return [
        stream(f"attacker{index}", first_seed + index, requests, attack_from=0, share=shares[index % 3])
        for index in range(count)
    ]


def ring(kinds: Sequence[LinkKind], count: int = 10, **how: Any) -> list[list[Event]]:
    """Return streams of accounts that share evidence of some kinds; the rest are arguments of :func:`stream`."""
    links = [(kind, KEY.hash(kind, "one hand")) for kind in kinds]
    return [stream(f"ring{index}", 90_000 + index, 32, links=links, **how) for index in range(count)]


def biased(name: str, ids: Sequence[Sequence[int]], max_tokens: int = 1, top_logprobs: int = 20) -> list[Event]:
    """Return events with logit biases, one for each set of ids."""
    events = stream(name, 1, len(ids))
    return [
        replace(event, biased=tuple(some), max_tokens=max_tokens, top_logprobs=top_logprobs)
        for event, some in zip(events, ids, strict=True)
    ]


def states(detector: TieredDetector, streams: Sequence[Sequence[Event]]) -> dict[str, PrincipalState]:
    """Return each principal's state after its stream."""
    states_N = detector.replay(streams).states
    return {events[0].principal: PrincipalState(states_N[row : row + 1]) for row, events in enumerate(streams)}


def fitted() -> TieredDetector:
    """Return a detector that is fitted on 120 honest principals."""
    return TieredDetector(Population.fit(honest(120), KEY, PROBE_NAMES), None, KEY, 576)


def calibrated(detector: TieredDetector) -> TieredDetector:
    """Return a detector with thresholds at 1% for every tier, on 300 honest principals of 96 requests."""
    states = detector.replay(honest(300, 10_000, 96)).states
    budget = Budget(own=0.01, level=0.01, group=0.01)
    thresholds = Calibration.fit(states["own"], states["level"], [""] * len(states), states["count"], budget=budget)
    return replace(detector, calibration=thresholds)

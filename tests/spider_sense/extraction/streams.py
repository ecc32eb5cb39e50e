"""Streams of made-up principals: every one has a mean of its own, its requests scatter around it."""

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction import Event, Key
from spider_sense.extraction.layout import PROBES, SKETCH, LinkKind

KEY = Key(b"a key for tests, not a secret")
PROBE_NAMES = ("reasoning", "rubric", "synthesis", "exam", "agent", "code")


def stream(
    name: str,
    seed: int,
    requests: int = 64,
    *,
    attack_from: int | None = None,
    share: float = 1.0,
    shift: float = 4.0,
    tenant: str = "",
    links: tuple[tuple[LinkKind, int], ...] = (),
    template: str | None = None,
    spread: float = 0.5,
) -> list[Event]:
    """Return a principal's events; an attack moves probe 0 and two sketch coordinates in a share of the requests.

    Args:
        spread: standard deviation of principals' means, where requests scatter with 1.
    """
    rng = np.random.default_rng(seed)
    centre = rng.normal(0, spread, SKETCH + PROBES)
    events = []
    for index in range(requests):
        x: NDArray[np.float32] = (centre + rng.normal(0, 1, len(centre))).astype(np.float32)
        attacks = attack_from is not None and index >= attack_from and rng.random() < share
        if attacks:
            x[[0, 3, 40]] += np.float32(shift)
            x[SKETCH] += np.float32(shift)
        text = (
            f"{template} {index}"
            if attacks and template
            else f"{name} asks something else {rng.integers(1e9)} {rng.random()}"
        )
        opening, closing = KEY.edges(
            text if attacks and template else f"{rng.integers(50)} w{rng.integers(20)} x{rng.integers(20)}"
        )
        events.append(
            Event(
                principal=name,
                time=1e9 + 60.0 * index,
                sketch=x[:SKETCH],
                probes=x[SKETCH : SKETCH + len(PROBE_NAMES)],
                tenant=tenant,
                opening=opening,
                closing=closing,
                parameters=KEY.parameters({"temperature": int(rng.integers(5)) / 4}),
                links=links,
                tokens=int(rng.integers(10, 200)),
            )
        )
    return events


def honest(count: int, first_seed: int = 0, requests: int = 64, tenant: str = "") -> list[list[Event]]:
    """Return streams of honest principals."""
    return [stream(f"honest{first_seed + i}", first_seed + i, requests, tenant=tenant) for i in range(count)]


def attackers(count: int, first_seed: int = 100_000, requests: int = 64) -> list[list[Event]]:
    """Return streams of attackers, from the first request, at several mixtures with honest traffic."""
    shares = (1.0, 0.5, 0.25)
    return [stream(f"attacker{i}", first_seed + i, requests, attack_from=0, share=shares[i % 3]) for i in range(count)]

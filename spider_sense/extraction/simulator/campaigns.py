"""Attackers: a campaign's requests, mixed into the traffic of an innocent cover."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.simulator.families import Family
from spider_sense.extraction.simulator.tenants import Tenant, stream_of_texts
from spider_sense.extraction.simulator.traffic import Request, Stream

__all__ = ["COVERS", "STARTS", "Cover", "Mixing", "Start", "attacker", "work_list"]

Cover = Literal["same", "random", "app"]
"""Where the innocent requests come from: one persona throughout, a persona drawn anew each time, a narrow product."""
COVERS: tuple[Cover, ...] = get_args(Cover)

Start = Literal["first", "pivot", "ramp", "release", "drip", "poison"]
"""first: from the first request. pivot: after ``warm_up`` innocent ones. ramp: the share rises from none over ``ramp``
requests. release: as pivot, every account at one moment. drip: as first, one to twenty requests a day. poison: as
pivot, with a fifth of the share in the warm-up, so that the account's own history knows the campaign."""
STARTS: tuple[Start, ...] = get_args(Start)

_RELEASE = 1.8e9 + 40 * 86_400
"""When a new model comes out, in seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """How a campaign hides in an account."""

    share: float = 1.0
    """Of the requests that are the campaign's, once it has begun."""
    cover: Cover = "same"
    start: Start = "first"
    warm_up: int = 60
    ramp: int = 500

    def shares(self, length: int) -> NDArray[np.float64]:
        """Return the probability that each request is the campaign's, [length]."""
        place = np.arange(length)
        if self.start in ("pivot", "release"):
            return np.where(place < self.warm_up, 0.0, self.share)
        if self.start == "poison":
            return np.where(place < self.warm_up, self.share / 5, self.share)
        if self.start == "ramp":
            return np.minimum(1.0, place / self.ramp) * self.share
        return np.full(length, self.share)


def work_list(campaign: Family, generator: np.random.Generator, texts: Sequence[str] | None = None) -> Iterator[str]:
    """Yield a campaign's requests in a random order, each once before any comes again.

    Args:
        campaign: whose texts.
        generator: of the order.
        texts: what to send, by default all texts inside the campaign's first wrapper.
    """
    chosen = tuple(texts) if texts is not None else campaign.wrapped()
    while True:
        yield from (chosen[index] for index in generator.permutation(len(chosen)))


def attacker(
    name: str,
    campaign: Family,
    mixing: Mixing,
    covers: Callable[[Cover], Sequence[Tenant]],
    length: int,
    seed: int,
    *,
    texts: Iterator[str] | None = None,
) -> Stream:
    """Return the stream of one account that works for a campaign.

    Args:
        name: of the account; with the seed it decides everything.
        campaign: what it asks for.
        mixing: how it hides that.
        covers: innocent tenants of a cover; ``same`` and ``app`` take one of them, ``random`` all.
        length: requests.
        seed: of the population.
        texts: the campaign's requests, by default its work list.
    """
    generator = np.random.default_rng([seed, *name.encode()])
    tenants = covers(mixing.cover)
    first = tenants[int(generator.integers(len(tenants)))]
    innocent = [tenant.cover() for tenant in (tenants if mixing.cover == "random" else [first])]
    malicious = texts or work_list(campaign, generator)
    attack = (generator.random(length) < mixing.shares(length)).tolist()
    drawn = generator.integers(len(innocent), size=length).tolist()
    sent = [next(malicious if bad else innocent[which]) for bad, which in zip(attack, drawn, strict=True)]
    kind = "campaign" if mixing.start == "first" and mixing.share == 1 else first.kind
    stream = stream_of_texts(name, kind, sent, generator, family=campaign.name, attack=attack)
    requests = _timed(stream.requests, mixing, generator)
    return replace(stream, tenant=first.kind, requests=requests, campaign=campaign.name)


def _timed(requests: tuple[Request, ...], mixing: Mixing, generator: np.random.Generator) -> tuple[Request, ...]:
    if mixing.start == "drip":
        gaps = generator.exponential(86_400 / generator.uniform(1, 20), len(requests))
        return tuple(
            replace(one, time=requests[0].time + later) for one, later in zip(requests, np.cumsum(gaps), strict=True)
        )
    if mixing.start == "release" and len(requests) > mixing.warm_up:
        shift = _RELEASE - requests[mixing.warm_up].time
        return tuple(replace(one, time=one.time + shift) for one in requests)
    return requests

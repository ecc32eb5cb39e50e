"""Innocent principals: people who chat, narrow products, evaluation harnesses, bulk labelling, tutoring sites.

They are made to be hard: people change their subject, harnesses go from one suite to the next, products repeat
themselves, labelling never ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.layout import LinkKind
from spider_sense.extraction.simulator.families import Family, Kind
from spider_sense.extraction.simulator.traffic import Request, Stream

__all__ = ["Tenant", "account_links", "clock", "resampled", "stream_of_texts"]

Links = tuple[tuple[LinkKind, str], ...]

_EPOCH = 1.8e9
_DAY = 86_400.0
_SESSIONS: Mapping[Kind, tuple[float, float, float]] = {
    "chat": (90, 8, 30_000),
    "app": (60, 400, 20_000),
    "harness": (1.5, 2_000, 200_000),
    "labelling": (2, 3_000, 60_000),
    "tutoring": (40, 200, 30_000),
    "campaign": (6, 1_000, 10_000),
}
"""Mean seconds between requests, mean requests of a session, mean seconds between sessions."""
_TEMPERATURES: Mapping[Kind, tuple[float, ...]] = {
    "chat": (0.7, 1.0),
    "app": (0.0, 0.2, 0.3, 0.5, 0.7),
    "harness": (0.0,),
    "labelling": (0.0, 0.1),
    "tutoring": (0.3, 0.7, 1.0),
    "campaign": (0.6, 0.8, 1.0),
}
_TOP_P = (0.8, 0.9, 0.95, 1.0)
_DRIFTS = 0.4
"""Share of people who change their subjects for good at some point."""
_NETWORKS, _CLIENTS = 200, 30
"""Networks and client libraries of the world; a few of each carry most of the traffic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Where an innocent principal's requests come from, without end.

    Args:
        name: of the principal; with the seed it decides everything.
        kind: what it is.
        families: what it may ask; it chooses among them.
        seed: of the population.
    """

    name: str
    kind: Kind
    families: Sequence[Family]
    seed: int = 0

    def stream(self, length: int) -> Stream:
        """Return its first requests."""
        generator = self._generator()
        chosen = self._chosen(generator)
        texts = self.texts(generator, chosen)
        return stream_of_texts(
            self.name,
            self.kind,
            [text for text, _ in zip(texts, range(length), strict=False)],
            generator,
            family="+".join(sorted({family.name for family in chosen})),
            # Two customers with the same product do not share the very words of its system prompt.
            system=f"{chosen[0].system} ({self.name})" if chosen[0].system else "",
        )

    def cover(self) -> Iterator[str]:
        """Yield its texts without end."""
        generator = self._generator()
        return self.texts(generator, self._chosen(generator))

    def texts(self, generator: np.random.Generator, chosen: Sequence[Family]) -> Iterator[str]:
        """Yield texts of the chosen families as this kind of tenant asks them."""
        match self.kind:
            case "chat":
                return _conversation(chosen, generator)
            case "app":
                return _repeating(chosen[0].texts, generator)
            case "tutoring":
                return _conversation(chosen[:2], generator)
            case _:
                return _runs(chosen, generator)

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, *self.name.encode()])

    def _chosen(self, generator: np.random.Generator) -> list[Family]:
        fewest, most = {"chat": (2, 4), "harness": (1, 2), "tutoring": (1, 2)}.get(self.kind, (1, 1))
        count = min(len(self.families), int(generator.integers(fewest, most + 1)))
        return [self.families[index] for index in generator.permutation(len(self.families))[:count]]


def stream_of_texts(
    name: str,
    kind: Kind,
    texts: Sequence[str],
    generator: np.random.Generator,
    *,
    family: str,
    system: str = "",
    attack: Sequence[bool] = (),
) -> Stream:
    """Give texts times, turns, parameters and the links of a single account."""
    times = clock(kind, len(texts), generator)
    limit = {"labelling": 8, "harness": 64}.get(kind, 0)
    requests = tuple(
        Request(text=text, time=time, max_tokens=limit, attack=bool(attack) and attack[index])
        for index, (text, time) in enumerate(zip(texts, times.tolist(), strict=True))
    )
    return Stream(
        principal=name,
        tenant=kind if kind != "campaign" else "chat",
        family=family,
        requests=requests,
        parameters=_parameters(kind, generator),
        links=account_links(name, generator, system),
    )


def account_links(name: str, generator: np.random.Generator, system: str = "") -> Links:
    """Return what a single account shows: a payment of its own, a network and a client as the world has them."""
    links: list[tuple[LinkKind, str]] = [
        ("payment", name),
        ("network", f"as{min(generator.zipf(1.3), _NETWORKS)}"),
        ("client", f"sdk{min(generator.zipf(1.4), _CLIENTS)}"),
    ]
    return (*links, ("prefix", system)) if system else tuple(links)


def resampled(stream: Stream, length: int, generator: np.random.Generator) -> Stream:
    """Return a stream of any length whose texts are drawn again from a principal's own: no drift, no order."""
    texts = [request.text for request in stream.requests]
    drawn = texts + [texts[index] for index in generator.integers(len(texts), size=max(0, length - len(texts)))]
    kind: Any = stream.tenant
    times = clock(kind, length, generator)
    last = stream.requests[-1]
    requests = stream.requests[:length] + tuple(
        Request(text=text, time=last.time + time - _EPOCH, max_tokens=last.max_tokens)
        for text, time in zip(drawn[len(texts) : length], times.tolist(), strict=False)
    )
    return Stream(
        principal=stream.principal,
        tenant=stream.tenant,
        family=stream.family,
        requests=requests,
        parameters=stream.parameters,
        links=stream.links,
        group=stream.group,
    )


def clock(kind: Kind, length: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return the times of requests, [length]."""
    gap, session, pause = _SESSIONS[kind]
    pace = generator.lognormal(0, 0.8)
    gaps = generator.exponential(gap * pace, length)
    breaks = generator.random(length) < 1 / session
    gaps[breaks] += generator.exponential(pause, int(breaks.sum()))
    times: NDArray[np.float64] = _EPOCH + generator.uniform(0, 30 * _DAY) + np.cumsum(gaps)
    return times


def _parameters(kind: Kind, generator: np.random.Generator) -> tuple[tuple[str, float], ...]:
    temperature = float(generator.choice(_TEMPERATURES[kind]))
    return (("temperature", temperature), ("top_p", float(generator.choice(_TOP_P))))


def _conversation(families: Sequence[Family], generator: np.random.Generator) -> Iterator[str]:
    decks = [_deck(family.texts, generator) for family in families]
    weights = generator.dirichlet(np.ones(len(families)))
    change = int(generator.integers(30, 300)) if generator.random() < _DRIFTS else -1
    count = 0
    while True:
        if count == change:
            weights = generator.dirichlet(np.ones(len(families)))
        yield next(decks[generator.choice(len(decks), p=weights)])
        count += 1


def _deck(texts: Sequence[str], generator: np.random.Generator) -> Iterator[str]:
    """Yield a part of the texts that is the principal's own, each once before any comes again."""
    own = generator.permutation(len(texts))[: max(1, int(len(texts) * generator.uniform(0.4, 1)))]
    while True:
        yield from (texts[index] for index in generator.permutation(own))


def _repeating(texts: Sequence[str], generator: np.random.Generator) -> Iterator[str]:
    weights = 1 / (1 + np.arange(len(texts))) ** generator.uniform(0.2, 1.0)
    order = generator.permutation(len(texts))
    while True:
        for index in generator.choice(order, size=256, p=weights / weights.sum()):
            yield texts[index]


def _runs(families: Sequence[Family], generator: np.random.Generator) -> Iterator[str]:
    """Yield each suite from its first text to its last, then the next one, then all of them again."""
    cuts = [family.texts[: max(1, int(len(family.texts) * generator.uniform(0.5, 1)))] for family in families]
    while True:
        for cut in cuts:
            yield from cut

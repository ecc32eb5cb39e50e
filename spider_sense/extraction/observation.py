"""What an engine tells of one request while it is served; it lives in memory until it has been folded."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.event import Event
from spider_sense.extraction.hashes import Hashes
from spider_sense.extraction.keys import Key
from spider_sense.extraction.layout import SKETCH, LinkKind
from spider_sense.extraction.lists import KnownLists
from spider_sense.extraction.turns import Turns

__all__ = ["Asked", "Observation", "Reader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a request was asked for."""

    parameters: Mapping[str, object] = field(default_factory=dict)
    """Sampling parameters that tell one client program from another."""
    biased: tuple[int, ...] = ()
    """Token ids that the client chose: with a logit bias, by name, or by allowing no others while logits are told."""
    top_logprobs: int = 0
    max_tokens: int = 0
    """0 if the request set none."""
    choices: int = 1
    """Answers that were asked for, and tokens of the prompt at which logits were asked for by name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """One request whose prompt has been read."""

    principal: str
    prompt: Sequence[int]
    """Its token ids."""
    asked: Asked
    reading: Callable[[], NDArray[np.float32]] | None
    """Waits for the device and returns [64 + P], the sketch and the probe logits; None where the prompt was not seen
    whole."""
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""


class Reader:
    """Makes events of observations: numbers and keyed hashes.

    Args:
        key: hashes.
        turns: takes prompts apart.
        tenants: declared types of principals.
        lists: known query lists; None for none.
    """

    def __init__(self, key: Key, turns: Turns, tenants: Mapping[str, str], lists: KnownLists | None = None) -> None:
        self._key, self._turns, self._tenants, self._lists = key, turns, tenants, lists

    def __call__(self, seen: Observation, party: str | None) -> Event:
        """Return a request as the detector sees it.

        Args:
            seen: the request.
            party: names all principals that are declared one with this one; None for nobody.
        """
        hashes = Hashes.of(self._turns.parts(seen.prompt), self._key, self._lists)
        declared: list[tuple[LinkKind, int]] = []
        if party is not None:
            declared.append(("declared", self._key.hash("declared", party)))
        reading = None if seen.reading is None else seen.reading()
        whole = None if reading is None or not np.isfinite(reading).all() else reading
        return Event(
            principal=seen.principal,
            time=seen.time,
            sketch=None if whole is None else whole[:SKETCH],
            probes=None if whole is None else whole[SKETCH:],
            tenant=self._tenants.get(seen.principal, ""),
            opening=hashes.opening,
            parameters=self._key.parameters(seen.asked.parameters),
            links=(*declared, *hashes.links),
            biased=seen.asked.biased,
            top_logprobs=seen.asked.top_logprobs,
            max_tokens=seen.asked.max_tokens,
            choices=seen.asked.choices,
            known_list=hashes.known_list,
        )

"""The nouns that every floor shares."""

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal, get_args

from spider_sense.errors import SiteError, nearest

__all__ = ["UNKNOWN", "ZONES", "Action", "Coverage", "Place", "Site", "Verdict", "Zone"]

Place = Literal["resid", "mlp_in", "gate", "up"]
"""resid: the residual stream after a block. mlp_in: what enters a block's MLP. gate, up: the outputs of the two MLP
projections before the activation function."""

Zone = Literal["clear", "suspect", "breach"]
"""Where a score lies: below both thresholds, between them, at or above the upper one (or not a number)."""

ZONES: tuple[Zone, ...] = get_args(Zone)
"""From mildest to strictest."""

Action = Literal["observe", "flag", "steer", "patch", "escalate", "stop", "throttle", "verify", "omit_reasoning"]
"""What a policy asks for; ``decision.SEVERITY`` orders them."""

UNKNOWN = "unknown"
"""The principal of every request that does not tell."""


@total_ordering
@dataclass(frozen=True, slots=True)
class Site:
    """A place in the model where hidden activations are read, written ``resid.12``, or ``gate.3.17`` in expert 17.

    Sites are ordered by layer, place and expert.
    """

    layer: int
    """Index of the block, from 0."""
    place: Place
    expert: int | None = None
    """Index of an expert of the block, from 0, which only the tokens that are routed to it pass; None where every token
    passes."""

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read ``place.layer``, or ``place.layer.expert`` of gate or up.

        Raises:
            SiteError: if the text is anything else.
        """
        match = re.fullmatch(r"(\w+)\.(\d+)(?:\.(\d+))?", text)
        if match is None:
            raise SiteError(
                f"cannot read site {text!r}; write it as place.layer, for example resid.12, or inside an expert as "
                "place.layer.expert, for example gate.3.17"
            )
        place, layer, expert = match.groups()
        if place not in get_args(Place):
            raise SiteError(f"unknown place {place!r} in site {text!r}; {nearest(place, get_args(Place))}")
        if expert is not None and place not in ("gate", "up"):
            raise SiteError(f"site {text!r} names an expert, and {place} is outside of experts; write {place}.{layer}")
        return cls(int(layer), place, None if expert is None else int(expert))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.place}.{self.layer}" + ("" if self.expert is None else f".{self.expert}")

    def __lt__(self, other: "Site") -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[int, str, int]:
        return self.layer, self.place, -1 if self.expert is None else self.expert


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a request the verdict rests on, in tokens."""

    scored: int = 0
    """Tokens whose activations were scored."""
    cached: int = 0
    """Tokens that were not recomputed, whose state was restored instead."""
    missing: int = 0
    """Tokens that nothing is known about."""

    @property
    def complete(self) -> bool:
        """Whether nothing is missing and something was seen."""
        return self.missing == 0 and self.scored + self.cached > 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one detector says of one request up to one token."""

    detector: str
    score: float
    """Maximum over time of the detector's readout, in logits; -inf before the end of the prompt."""
    threshold: float
    """The breach threshold that the score is compared with."""
    zone: Zone
    position: int
    """Absolute position of the last token that the verdict includes."""
    coverage: Coverage

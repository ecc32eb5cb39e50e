"""One signature: a direction in activation space that stands for a handful of examples.

Shape letters: K examples, D width.
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

import torch
from pydantic import Field, field_validator
from torch import Tensor

from spider_sense.errors import BankError
from spider_sense.folders import Record

__all__ = ["KINDS", "About", "Kind", "Signature", "Trial", "from_examples", "merged"]

Kind = Literal["misuse", "injection", "extraction", "benign"]
"""benign: what looks like an attack and is none; a suspect near it is let through."""

KINDS: tuple[Kind, ...] = get_args(Kind)
GRID = 0.01
"""Radii are multiples of it, so that a bank has few of them."""


class Trial(Record):
    """What a signature did on traffic before it was taken."""

    benign: int = Field(ge=0)
    """Benign spans it was tried on."""
    fired: int = Field(ge=0)
    """How many of them it fired on."""
    attacks: int = Field(ge=0)
    """Attacks that a benign look-alike was tried on; 0 for other kinds."""
    excused: int = Field(ge=0)
    """How many of them it fired on."""


class About(Record):
    """What a bank's manifest says of a signature; never the text that it was made from."""

    id: str = Field(pattern=r"^[\w.-]{1,64}$")
    kind: Kind
    radius: float = Field(gt=0, lt=1)
    """Cosine distance up to which it fires."""
    examples: int = Field(ge=1)
    """How many it was made from."""
    provenance: str = Field(min_length=1, max_length=200)
    """Who made it, and from what."""
    created: str = Field(max_length=32)
    """Date."""
    trial: Trial | None = None
    """None before it was tried."""

    @field_validator("radius")
    @classmethod
    def _on_the_grid(cls, radius: float) -> float:
        return round(radius, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Signature:
    """A signature in memory."""

    about: About
    vector_D: Tensor
    """[D] float32 of unit length."""

    @property
    def benign(self) -> bool:
        """Whether it is a look-alike."""
        return self.about.kind == "benign"


def from_examples(id: str, kind: Kind, units_KD: Tensor, provenance: str, radius: float | None = None) -> Signature:  # noqa: A002
    """Make a signature of a handful of examples.

    Args:
        id: its name.
        kind: what it stands for.
        units_KD: [K, D] float32, unit vectors of the examples.
        provenance: who made it, and from what.
        radius: cosine distance up to which it fires; by default the largest distance of an example from the mean of
            the others, which is how far an example that was not seen may lie.

    Raises:
        BankError: if there is one example alone and no radius, or the examples have no common direction.
    """
    if radius is None:
        if len(units_KD) < 2:
            raise BankError(f"{id}: {len(units_KD)} example says nothing of a radius; give two or more, or --radius")
        others_KD = torch.nn.functional.normalize(units_KD.sum(0) - units_KD)
        radius = math.ceil((1 - (others_KD * units_KD).sum(1).min().item()) / GRID) * GRID
    mean_D = units_KD.mean(0)
    if not 0 < radius < 1 or not mean_D.norm() > 0:
        raise BankError(
            f"{id}: the examples lie {radius:.2f} apart, and a radius must be above 0 and below 1; "
            "leave out those that are unlike the others, or make several signatures"
        )
    about = About(
        id=id,
        kind=kind,
        radius=max(radius, GRID),
        examples=len(units_KD),
        provenance=provenance,
        created=datetime.now(UTC).date().isoformat(),
    )
    return Signature(about, mean_D / mean_D.norm())


def merged(old: Signature, new: Signature) -> Signature:
    """Return one signature for two near-duplicates: their weighted mean, wide enough to fire wherever either fired.

    Angles on the sphere obey the triangle inequality, cosine distances do not.
    """
    total = old.about.examples + new.about.examples
    mean_D = old.vector_D * (old.about.examples / total) + new.vector_D * (new.about.examples / total)
    vector_D = mean_D / mean_D.norm()
    reach = max(_angle(vector_D @ part.vector_D) + math.acos(1 - part.about.radius) for part in (old, new))
    radius = math.ceil((1 - math.cos(min(reach, math.pi / 2))) / GRID - 1e-9) * GRID
    parts = dict.fromkeys([*old.about.provenance.split("; "), *new.about.provenance.split("; ")])
    provenance = "; ".join(parts)[:200]
    update = {"radius": min(round(radius, 2), 1 - GRID), "examples": total, "provenance": provenance, "trial": None}
    return Signature(old.about.model_copy(update=update), vector_D)


def _angle(cosine: Tensor) -> float:
    return math.acos(max(-1.0, min(1.0, cosine.item())))

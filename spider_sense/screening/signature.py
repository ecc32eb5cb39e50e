"""One signature: a direction in activation space that stands for a handful of examples.

Shape letters: K examples, D width.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor

from spider_sense.errors import BankError
from spider_sense.folders import Record

__all__ = ["KINDS", "About", "Kind", "Signature", "Trial", "distances_left_out", "from_examples", "merged"]

Kind = Literal["misuse", "injection", "extraction", "benign"]
"""benign: what looks like an attack and is none; a suspect near it is let through."""

KINDS: tuple[Kind, ...] = get_args(Kind)
LONGEST = 200
"""Characters of a provenance."""


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
    """Cosine distance up to which it fires, in hundredths, so that a bank has few of them."""
    examples: int = Field(ge=1)
    """How many it was made from."""
    provenance: str = Field(min_length=1, max_length=LONGEST)
    """Who made it, and from what."""
    created: str = Field(max_length=32)
    """Date."""
    trial: Trial | None = None
    """None before it was tried."""
    imported: bool = False
    """Whether another operator made it; such a one stands by itself and is never merged."""

    @field_validator("radius")
    @classmethod
    def _in_hundredths(cls, radius: float) -> float:
        if round(radius, 2) != radius:
            raise ValueError("a radius has two decimals")
        return radius


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


def from_examples(name: str, kind: Kind, units_KD: Tensor, provenance: str, radius: float) -> Signature:
    """Make a signature of a handful of examples: their mean direction.

    Args:
        name: its id.
        kind: what it stands for.
        units_KD: [K, D] float32, unit vectors of the examples.
        provenance: who made it, and from what.
        radius: cosine distance up to which it fires.

    Raises:
        BankError: if a field cannot be kept as it is, or the examples have no common direction.
    """
    mean_D = units_KD.mean(0)
    if not mean_D.norm() > 0:
        raise BankError(f"{name}: the examples have no common direction; make several signatures of them")
    try:
        about = About(
            id=name,
            kind=kind,
            radius=radius,
            examples=len(units_KD),
            provenance=provenance,
            created=datetime.now(UTC).date().isoformat(),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise BankError(f"{first['loc'][0]}: {first['input']!r:.80} is not allowed; {first['msg'].lower()}") from error
    return Signature(about, mean_D / mean_D.norm())


def distances_left_out(units_KD: Tensor) -> Tensor:
    """Return how far each example lies from the mean direction of the others, as cosine distances [K].

    That is how far an example that nobody has seen may lie. A single example has none but itself: 1.
    """
    others_KD = torch.nn.functional.normalize(units_KD.sum(0) - units_KD)
    return 1 - (others_KD * units_KD).sum(1)


def merged(old: Signature, new: Signature) -> Signature:
    """Return one signature for two near-duplicates: their mean, weighted by examples, and the wider radius."""
    total = old.about.examples + new.about.examples
    mean_D = old.vector_D * (old.about.examples / total) + new.vector_D * (new.about.examples / total)
    parts = dict.fromkeys([*old.about.provenance.split("; "), *new.about.provenance.split("; ")])
    update = {
        "radius": max(old.about.radius, new.about.radius),
        "examples": total,
        "provenance": "; ".join(parts)[:LONGEST],
        "trial": None,
    }
    return Signature(old.about.model_copy(update=update), mean_D / mean_D.norm())

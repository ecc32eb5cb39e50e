"""Splits that nothing crosses: families of tenants, families of campaigns, real people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

from spider_sense.errors import DataError
from spider_sense.extraction.simulator.families import Family, Kind

__all__ = ["KINDS", "PARTS", "Part", "Split", "split_families"]

Part = Literal["fit", "calibrate", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
KINDS: tuple[Kind, ...] = ("chat", "app", "harness", "labelling", "tutoring")

_CUTS: Mapping[Kind, tuple[float, float]] = {"campaign": (0.4, 0.4)}
"""Where the fit part ends and the test part begins; calibration sees no campaign."""
_CUT = (0.34, 0.67)

Real = tuple[str, tuple[str, ...]]
"""Principal and texts of a real stream."""
ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Who is in which part."""

    families: Mapping[tuple[Part, Kind], tuple[Family, ...]]
    people: Mapping[Part, tuple[Real, ...]]
    """Real streams of people."""


def split_families(families: Sequence[Family], people: Sequence[Real], seed: int) -> Split:
    """Split families of each kind, and people, in an order that the seed draws.

    Raises:
        DataError: if a kind has too few families for three parts.
    """
    found: dict[tuple[Part, Kind], tuple[Family, ...]] = {}
    kinds: tuple[Kind, ...] = (*KINDS, "campaign")
    for place, kind in enumerate(kinds):
        generator = np.random.default_rng([seed, place])
        parts = _cut([family for family in families if family.kind == kind], _CUTS.get(kind, _CUT), generator)
        for part in PARTS:
            found[part, kind] = tuple(parts[part])
            if not parts[part] and not (part == "calibrate" and kind == "campaign"):
                raise DataError(f"no family of kind {kind!r} is left for the part {part!r}; at least 3 are needed")
    parts_of_people = _cut(people, _CUT, np.random.default_rng([seed, len(kinds)]))
    return Split(families=found, people={part: tuple(parts_of_people[part]) for part in PARTS})


def _cut(items: Sequence[ItemT], cut: tuple[float, float], generator: np.random.Generator) -> dict[Part, list[ItemT]]:
    order = generator.permutation(len(items)).tolist()
    low, high = round(cut[0] * len(items)), round(cut[1] * len(items))
    return {
        "fit": [items[index] for index in order[:low]],
        "calibrate": [items[index] for index in order[low:high]],
        "test": [items[index] for index in order[high:]],
    }

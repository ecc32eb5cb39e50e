"""Splits of labelled rows, without a leak from one part into another."""

import hashlib
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from spider_sense.errors import ConfigError
from spider_sense.labels import LabelledSet

__all__ = ["split"]


def split(examples: LabelledSet, fractions: Mapping[str, float], seed: int) -> dict[str, LabelledSet]:
    """Split a set by group, so that no group (a pair) is separated.

    Groups are stratified by their sources and classes. Within a stratum they are ordered by the SHA-256 of seed and
    group name and cut in proportion, to within one group of each fraction. So a file that is added moves no row of
    another file.

    Args:
        examples: the set.
        fractions: share of each part; they sum to 1.
        seed: another seed gives another split.

    Returns:
        A set for each name in ``fractions``, in its order, with the rows in theirs.

    Raises:
        ConfigError: if a fraction is not positive or they do not sum to 1.
    """
    total = sum(fractions.values())
    if abs(total - 1) > 1e-9 or min(fractions.values(), default=0) <= 0:
        raise ConfigError(f"cannot split by {dict(fractions)}; each fraction must be above 0 and their sum must be 1")
    names, bounds = list(fractions), list(accumulate(fractions.values()))[:-1]
    part_of = {
        group: names[bisect_right(bounds, place)]
        for stratum, groups in _strata(examples).items()
        for group, place in _places(stratum, groups, seed)
    }
    return {name: _part(examples, [part_of[example.group] == name for example in examples.examples]) for name in names}


def _strata(examples: LabelledSet) -> dict[str, list[str]]:
    kinds: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for example, label in zip(examples.examples, examples.labels.tolist(), strict=True):
        kinds[example.group].add((example.source, label))
    strata: dict[str, list[str]] = defaultdict(list)
    for group, kind in kinds.items():
        strata[json.dumps(sorted(kind))].append(group)
    return strata


def _places(stratum: str, groups: Sequence[str], seed: int) -> list[tuple[str, float]]:
    # The offset is the stratum's own: without one, every stratum of a single group would land in the same part.
    offset = _uniform(stratum, seed)
    order = sorted(groups, key=lambda group: _uniform(group, seed))
    return [(group, (rank + offset) / len(order)) for rank, group in enumerate(order)]


def _uniform(name: str, seed: int) -> float:
    code = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(code[:8], "big") / 2**64


def _part(examples: LabelledSet, inside: Sequence[bool]) -> LabelledSet:
    chosen = tuple(example for example, keep in zip(examples.examples, inside, strict=True) if keep)
    return LabelledSet(examples=chosen, labels=examples.labels[np.array(inside, dtype=np.bool_)])

"""What a request adds to its principal's counters. Nothing here is learned.

Shape letters: N principals with one request each, S sketch, P probes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.counting import count_key, register_of
from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.layout import LINK_KINDS, LinkKind, States
from spider_sense.extraction.merge import smallest
from spider_sense.extraction.mixing import bit_length, mix

__all__ = ["SCORING", "half_of", "record"]

LINKING, SCORING = 0, 1
"""Halves of a principal's requests."""
CLIP = 4.0
"""Probe logits are cut here before they are summed."""
BIN = 600.0
"""Seconds of a bin of activity."""
_CONTENT: tuple[LinkKind, ...] = ("parameters", "prefix", "template", "activity")
"""Evidence of single requests; it is taken from the linking half only."""


def half_of(states_N: States) -> NDArray[np.int64]:
    """Return which half the next request of each principal belongs to, [N]."""
    return (mix(states_N["seed"], states_N["count"].astype(np.uint64)) >> np.uint64(63)).astype(np.int64)


def record(states_N: States, batch: EventBatch, salt: int) -> None:
    """Count the requests, in place.

    Args:
        states_N: whose they are.
        batch: N requests.
        salt: keyed 64 bits that token ids are hashed with.
    """
    half = half_of(states_N)
    _count(states_N, batch)
    count_key(states_N["openings"], states_N["opening_counts"], batch.opening)
    _count_bias(states_N, batch, np.uint64(salt))
    _link(states_N, batch, half == LINKING)
    seen = np.flatnonzero(np.isfinite(batch.sketch[:, 0]))
    if len(seen) == len(states_N):
        _record_sketch(states_N, batch.sketch, batch.probes, half)
    elif len(seen):
        part = states_N[seen]
        _record_sketch(part, batch.sketch[seen], batch.probes[seen], half[seen])
        states_N[seen] = part


def _count(states_N: States, batch: EventBatch) -> None:
    states_N["first"] = np.where(states_N["count"] == 0, batch.time, np.minimum(states_N["first"], batch.time))
    states_N["last"] = np.where(states_N["count"] == 0, batch.time, np.maximum(states_N["last"], batch.time))
    states_N["tenant"] = np.where(batch.tenant != b"", batch.tenant, states_N["tenant"])
    states_N["count"] += 1
    hit = np.flatnonzero(batch.known_list >= 0)
    states_N["list_hits"][hit, batch.known_list[hit]] += 1


def _count_bias(states_N: States, batch: EventBatch, salt: np.uint64) -> None:
    for row in (row for row, ids in enumerate(batch.biased) if ids):
        ids = np.unique(np.array(batch.biased[row], dtype=np.uint64))
        registers = states_N["biased_ids"][row]
        index, rank = register_of(mix(np.full(len(ids), salt), ids), len(registers))
        np.maximum.at(registers, index, rank)
        states_N["biased_requests"][row] += 1
        states_N["widest_bias"][row] = max(int(states_N["widest_bias"][row]), len(ids))
        states_N["revealed"][row] += np.uint64(min(len(ids), max(int(batch.top_logprobs[row]), 0)))
        longest = np.array([max(int(batch.max_tokens[row]), 0)], dtype=np.uint64)
        # Without a limit the answer may be long.
        column = min(int(bit_length(longest)[0]), 15) if batch.max_tokens[row] > 0 else 15
        states_N["max_tokens"][row, column] += 1


def _link(states_N: States, batch: EventBatch, linking: NDArray[np.bool_]) -> None:
    bins = np.floor(batch.time / BIN).astype(np.int64).astype(np.uint64)
    activity = np.where(batch.opening != 0, mix(batch.opening, bins), np.uint64(0))
    for kind, hashes in (("parameters", batch.parameters), ("template", batch.opening), ("activity", activity)):
        rows = np.flatnonzero(linking & (hashes != 0))
        _insert(states_N["links"][:, LINK_KINDS.index(kind)], rows, hashes[rows])
    for (kind, _), (rows, hashes) in _named(batch.links).items():
        kept = linking[rows] if kind in _CONTENT else slice(None)
        _insert(states_N["links"][:, LINK_KINDS.index(kind)], rows[kept], hashes[kept])


def _named(
    links: Sequence[Sequence[tuple[LinkKind, int]]],
) -> dict[tuple[LinkKind, int], tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """Return rows and hashes by kind and by place among a row's hashes of that kind, so that no row comes twice."""
    found: dict[tuple[LinkKind, int], tuple[list[int], list[int]]] = {}
    for row, pairs in enumerate(links):
        seen: dict[LinkKind, int] = {}
        for kind, token in pairs:
            seen[kind] = place = seen.get(kind, -1) + 1
            rows, tokens = found.setdefault((kind, place), ([], []))
            rows.append(row)
            tokens.append(token)
    return {
        name: (np.array(rows, dtype=np.int64), np.array(tokens, dtype=np.uint64))
        for name, (rows, tokens) in found.items()
    }


def _insert(links_NL: NDArray[np.uint64], rows: NDArray[np.int64], hashes: NDArray[np.uint64]) -> None:
    kept = links_NL[rows]
    new = (hashes < kept[:, -1]) & ~(kept == hashes[:, None]).any(axis=1)
    if new.any():
        links_NL[rows[new]] = smallest(np.concatenate([kept[new], hashes[new, None]], axis=1))


def _record_sketch(
    states_N: States, sketch_NS: NDArray[np.float32], probes_NP: NDArray[np.float32], half: NDArray[np.int64]
) -> None:
    every, moments = np.arange(len(states_N)), states_N["moments"]
    moments["count"][every, half] += 1
    moments["sketch"][every, half] += sketch_NS
    moments["probe"][every, half] += np.clip(probes_NP[:, 0], -CLIP, CLIP)
    states_N["sketched"] += 1

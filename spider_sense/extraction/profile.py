"""What a request adds to its principal's counters. Nothing here is learned.

Shape letters: N principals with one request each, S sketch, P probes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.counting import count_key, register_of
from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.layout import EMPTY_LINK, LINK_KINDS, LINK_SLOTS, LinkKind, States
from spider_sense.extraction.mixing import mix
from spider_sense.extraction.sample import sample

__all__ = ["record"]

CLIP = 4.0
"""Probe logits are cut here before they are summed."""
UNLIMITED = 2**14
"""Stands for the limit of a request that sets none."""
ANSWER = 256
"""Tokens of an answer that count at most; each shows the logits anew, and few answers are as long as they may be."""


def record(states_N: States, batch: EventBatch, salt: int) -> None:
    """Count the requests, in place.

    Args:
        states_N: whose they are.
        batch: N requests.
        salt: keyed 64 bits that token ids are hashed with.
    """
    _count(states_N, batch)
    count_key(states_N["openings"], states_N["opening_counts"], batch.opening)
    _count_bias(states_N, batch, np.uint64(salt))
    _link(states_N, batch)
    seen = np.isfinite(batch.sketch[:, 0])
    states_N["sketched"] += seen
    states_N["probe"] += np.where(seen, np.clip(batch.probes[:, 0], -CLIP, CLIP), 0)
    sample(states_N, batch)


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
        longest = int(batch.max_tokens[row]) or UNLIMITED
        shown = min(len(ids), int(batch.top_logprobs[row])) * min(longest, ANSWER)
        states_N["revealed"][row] += np.uint64(shown * int(batch.choices[row]))
        states_N["max_tokens"][row, min(longest.bit_length(), 15)] += 1


def _link(states_N: States, batch: EventBatch) -> None:
    rows = np.flatnonzero(batch.parameters)
    _insert(states_N["links"][:, LINK_KINDS.index("parameters")], rows, batch.parameters[rows])
    for (kind, _), (rows, hashes) in _named(batch.links).items():
        _insert(states_N["links"][:, LINK_KINDS.index(kind)], rows, hashes)


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
        links_NL[rows[new]] = _smallest(np.concatenate([kept[new], hashes[new, None]], axis=1))


def _smallest(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the ``LINK_SLOTS`` smallest different hashes along the last axis, ascending, filled up with EMPTY_LINK."""
    ordered = np.sort(hashes, axis=-1)
    repeated = np.zeros(ordered.shape, dtype=bool)
    repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return np.sort(np.where(repeated, EMPTY_LINK, ordered), axis=-1)[..., :LINK_SLOTS]

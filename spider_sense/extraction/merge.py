"""Two states of one principal become one.

Counts, sums and histograms add; HyperLogLog registers and running maxima take the larger; of bottom-k sketches the
smallest hashes stay. Shiryaev-Roberts statistics add: ``M - t`` of each is a supermartingale, so
``M1 + M2 - (t1 + t2)`` is one, as far as each is.

Shape letters: N principals, K slots.
"""

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.layout import EMPTY_LINK, FROZEN, LINK_SLOTS, States

__all__ = ["merged", "smallest"]

_ADDED = ("count", "sketched", "probe", "history", "recent", "biased_requests", "revealed", "max_tokens", "list_hits")
_MAXED = ("biased_ids", "widest_bias", "own", "level", "last", "decided")


def merged(one_N: States, other_N: States) -> States:
    """Return [N] states, each of two."""
    result = one_N.copy()
    for name in _ADDED:
        result[name] = one_N[name] + other_N[name]
    for name in _MAXED:
        result[name] = np.maximum(one_N[name], other_N[name])
    result["openings"], result["opening_counts"] = _heaviest(one_N, other_N, "openings", "opening_counts")
    result["bets"] = np.logaddexp(one_N["bets"], other_N["bets"])
    result["links"] = smallest(np.concatenate([one_N["links"], other_N["links"]], axis=-1))
    _take_older(result, one_N, other_N)
    unseen, other_unseen = one_N["count"] == 0, other_N["count"] == 0
    result[unseen], result[other_unseen] = other_N[unseen], one_N[other_unseen]
    result["seed"] = one_N["seed"]
    return result


def _take_older(result: States, one_N: States, other_N: States) -> None:
    """What has an order: the frozen baseline is the older principal's."""
    other_is_older = other_N["first"] < one_N["first"]
    result["first"] = np.where(other_is_older, other_N["first"], one_N["first"])
    result["frozen"][other_is_older] = other_N["frozen"][other_is_older]
    older, newer = (np.where(flag, other_N["tenant"], one_N["tenant"]) for flag in (other_is_older, ~other_is_older))
    result["tenant"] = np.where(older != b"", older, newer)
    for at, name in (("own_at", "own"), ("level_at", "level")):
        result[at] = np.where(other_N[name] > one_N[name], other_N[at], one_N[at])
    assert (result["frozen"].sum(axis=-1) <= FROZEN).all()


def _heaviest(one_N: States, other_N: States, keys: str, counts: str) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Merge two Misra-Gries summaries (Agarwal et al. 2012): add, then take off the heaviest count that has no slot."""
    slots = one_N[keys].shape[-1]
    keys_NK = np.concatenate([one_N[keys], other_N[keys]], axis=-1)
    counts_NK = np.concatenate([one_N[counts], other_N[counts]], axis=-1).astype(np.int64)
    same_NK = (keys_NK[:, :slots, None] == keys_NK[:, None, slots:]) & (counts_NK[:, :slots, None] > 0)
    counts_NK[:, :slots] += (same_NK * counts_NK[:, None, slots:]).sum(axis=-1)
    counts_NK[:, slots:][same_NK.any(axis=1)] = 0
    order_NK = np.argsort(-counts_NK, axis=-1, kind="stable")
    keys_NK, counts_NK = (np.take_along_axis(array, order_NK, axis=-1) for array in (keys_NK, counts_NK))
    kept = np.maximum(counts_NK[:, :slots] - counts_NK[:, slots : slots + 1], 0)
    return np.where(kept > 0, keys_NK[:, :slots], 0).astype(np.uint64), kept.astype(np.uint32)


def smallest(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the ``LINK_SLOTS`` smallest different hashes along the last axis, ascending, filled up with EMPTY_LINK."""
    ordered = np.sort(hashes, axis=-1)
    repeated = np.zeros(ordered.shape, dtype=bool)
    repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return np.sort(np.where(repeated, EMPTY_LINK, ordered), axis=-1)[..., :LINK_SLOTS]

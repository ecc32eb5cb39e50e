"""Tier 1: has a principal's stream changed against its own past, towards campaigns?

The directions are probe logits, how unusual a request is, and how many of the principal's requests have opened as this
one does; each has a smoothed p-value against the principal's earlier requests, of which the last weighs 1 and each one
before it 0.99 times the next. Bets on them go into Shiryaev-Roberts detectors (Shin, Ramdas and Rinaldo 2023), whose
mixture is one:

    p = (past above + U (past in the same bin + 1)) / (past + 1)
    M = (M + 1) / (2 sqrt(p))

The past is forgotten because people change. Against all of it an honest change of subject is evidence for as long as
the old subject outweighs the new one, hundreds of requests, and those who changed set the threshold.

The bins begin where few honest requests lie, and all that is lower is one bin: an innocent change of subject moves a
logit, but from one everyday value to another. A bin index is a fixed function of the request, so p stays legal; only
the share of alike openings looks at what came before.

No bound is claimed for the statistic itself: forgetting makes p approximate, and real streams drift. What decides is a
threshold over principals; the statistic is ``ln(M / max(n, 32))`` after n bets, which keeps one scale for short and
long lives. A second set of bets compares with the first 48 requests alone, which neither a slow ramp nor forgetting can
drag along. What is estimated once is wrong for ever, so there p is an upper bound, ``(k + 1 + 2 sqrt(k + 1)) / 49``
with k of the 48 as far out; the threshold over principals covers the rest.

Shape letters: N principals, J directions, B bins.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.layout import FROZEN, States
from spider_sense.extraction.mixing import mix, uniform

__all__ = ["LEAST", "alike", "bet", "binned", "directions", "leading_direction", "statistic"]

LEAST = 20
"""Requests before the first bet."""
FORGETTING = np.float32(0.99)
"""Weight that a request keeps with each one after it: half of it is gone after 69."""
SHORTEST = 32
"""Bets below which the statistic is divided by this number instead."""

_STREAM = np.uint64(0x5851F42D4C957F2D)
"""Keeps these uniform numbers apart from others of the same seed."""


def directions(batch: EventBatch) -> NDArray[np.float32]:
    """Return what the requests alone tell, [N, J - 1]: probe logits, and the sketch's norm."""
    norm_N1 = np.linalg.norm(batch.sketch, axis=1, keepdims=True)
    return np.concatenate([batch.probes, norm_N1], axis=1, dtype=np.float32)


def alike(states_N: States, batch: EventBatch) -> NDArray[np.float32]:
    """Return the share of each principal's requests that have opened as its last one does, [N, 1]."""
    same_NK = (states_N["openings"] == batch.opening[:, None]) & (batch.opening != 0)[:, None]
    counts = (states_N["opening_counts"] * same_NK).sum(axis=1, keepdims=True)
    return np.asarray(counts / states_N["count"][:, None], dtype=np.float32)


def binned(directions_NJ: NDArray[np.float32], edges: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the bin of each number, [N, J]: how many of its direction's edges, [J, B - 1], lie below it."""
    result: NDArray[np.int64] = (directions_NJ[:, :, None] > edges).sum(axis=2)
    return result


def bet(states_N: States, bins_NJ: NDArray[np.int64], active: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Bet against the requests' bins, add them to the histories, in place, and return the statistic [N].

    Args:
        states_N: after ``record``, so that ``sketched`` counts this request.
        bins_NJ: from ``binned``.
        active: directions that carry something, [J].
    """
    past = states_N["sketched"].astype(np.int64) - 1
    u_N = uniform(mix(states_N["seed"] ^ _STREAM, past.astype(np.uint64)))
    for which, (name, first) in enumerate((("recent", LEAST), ("frozen", FROZEN))):
        rows = np.flatnonzero(past >= first)
        if len(rows):
            tails = _tails(states_N[name][rows], bins_NJ[rows])
            p = _smoothed(*tails, u_N[rows]) if which == 0 else _bounded(*tails)
            states_N["bets"][rows, which] = np.logaddexp(states_N["bets"][rows, which], 0) - np.log(2 * np.sqrt(p))
    each_N = np.arange(len(states_N))
    every = each_N[:, None], np.arange(bins_NJ.shape[1])[None]
    states_N["history"][each_N, bins_NJ[:, 0]] += 1
    states_N["recent"] *= FORGETTING
    states_N["recent"][*every, bins_NJ] += 1
    states_N["frozen"][*every, bins_NJ] += (past < FROZEN)[:, None].astype(np.uint8)
    return statistic(states_N, active)


Weights = NDArray[np.float64]


def _tails(counts_NJB: NDArray[Any], bins_NJ: NDArray[np.int64]) -> tuple[Weights, Weights, Weights]:
    """Return how much of the past lies above the bin, in it, and in all, [N, J] each."""
    up_to = np.cumsum(counts_NJB, axis=2, dtype=np.float64)
    at, same = (np.take_along_axis(array, bins_NJ[:, :, None], axis=2)[:, :, 0] for array in (up_to, counts_NJB))
    return up_to[:, :, -1] - at, same.astype(np.float64), up_to[:, :, -1]


def _smoothed(above: Weights, same: Weights, total: Weights, u_N: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (above + u_N[:, None] * (same + 1)) / (total + 1)
    return result


def _bounded(above: Weights, same: Weights, total: Weights) -> NDArray[np.float64]:
    k = above + same + 1
    result: NDArray[np.float64] = np.minimum((k + 2 * np.sqrt(k)) / (total + 1), 1)
    return result


def statistic(states_N: States, active: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return ``ln(M / max(n, 32))`` of the even mixture over baselines and directions, [N]; -inf before a bet."""
    mixture = _log_mean(states_N["bets"][:, :, active].astype(np.float64))
    placed = states_N["sketched"].astype(np.int64) - LEAST
    result: NDArray[np.float64] = mixture - np.log(np.maximum(placed, SHORTEST))
    return result


def leading_direction(states_N: States, active: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return which direction's evidence is the largest, [N]."""
    bets = np.where(active, states_N["bets"], -np.inf)
    result: NDArray[np.int64] = bets.max(axis=1).argmax(axis=1)
    return result


def _log_mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ln of the mean of exp over all axes but the first, [N]."""
    # Row by row in memory: the order of a sum, and so its rounding, must not depend on how many principals share it.
    flat = np.ascontiguousarray(x).reshape(len(x), -1)
    peak = np.maximum(flat.max(axis=1), -1e300)
    with np.errstate(divide="ignore"):
        result: NDArray[np.float64] = np.log(np.exp(flat - peak[:, None]).mean(axis=1)) + peak
    return result

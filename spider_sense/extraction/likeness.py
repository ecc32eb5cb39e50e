"""What linked accounts have in common, as one number: the score of a group.

What a campaign's accounts work on shows in all of them together, through each one's cover: in a template if it has one,
in the probe, and in requests that every account has and that resemble each other, among others that differ from account
to account; and it differs from every cover in the same way. An honest group with one subject has nothing but requests
that resemble each other, and one whose members do different things has none.

Shape letters: N members, K requests of a sample, M those of other members, H members that others are compared with.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.layout import CHECKPOINTS, States
from spider_sense.extraction.population import QUANTILES
from spider_sense.extraction.sample import sampled

__all__ = ["ALIKE", "COMMON", "group_contrast", "group_score", "group_shares", "group_variety"]

ALIKE = 0.2
"""Share of requests that open alike, beyond which more tells nothing."""
COMMON = 0.94
"""Share of honest requests whose campaign probe lies below what counts as high."""
RARE = QUANTILES.index(COMMON) + 1
"""First bin of the campaign probe that counts as high."""
FEW = 3 / 16
"""Share of a member's requests that may be the campaign's: the most alike, and the highest."""
APART = 0.05
"""Share of the sketches' variance that lies between members, from which they count as doing different things."""
ORIGIN = -2.0
"""Logits that the contrast counts from; most honest groups lie below."""
WEIGHT = 0.1
"""Of a logit beside a share."""
HUBS = 32
"""Members that each one is compared with at most, so that a large group costs no square."""

Requests = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Logits [K] and sketches [K, S] of one member."""


def group_score(states_N: States) -> float:
    """Return the sum of the two shares, the first one up to a fifth, and a tenth of the contrast.

    Beyond a fifth, openings tell a product from a person, not a campaign from a product; where members do the same
    thing all the time they are a product's, and count half. It is -inf where neither two members nor all of them on
    average have sent as much as the first checkpoint of the level.
    """
    count = states_N["count"]
    if len(count) < 2 or max(np.sort(count)[-2], count.mean()) < CHECKPOINTS[0]:
        return -math.inf
    alike, high = group_shares(states_N)
    return min(alike, ALIKE) * (1 + group_variety(states_N)) / 2 + high + WEIGHT * group_contrast(states_N)


def group_shares(states_N: States) -> tuple[float, float]:
    """Return which shares of all requests of N members open alike, and have a campaign probe that is high among honest
    ones; zeros where there is nothing."""
    openings, counts = states_N["openings"].ravel(), states_N["opening_counts"].ravel()
    _, which = np.unique(openings, return_inverse=True)
    alike = float(np.bincount(which, counts).max()) / max(int(states_N["count"].sum()), 1)
    high = float(states_N["history"][:, RARE:].sum()) / max(int(states_N["sketched"].sum()), 1)
    return alike, high


def group_contrast(states_N: States) -> float:
    """Return how far the probe of the requests that members share exceeds that of all, as a logit, on average over the
    members and counted from where most honest groups lie below.

    It fades to zero where the members do the same thing all the time, and where what is high differs from the rest in
    ways of their own. It is zero where no two have sent as much as the first checkpoint: others are not looked at.
    """
    members = _members(states_N)
    if len(members) < 2:
        return 0.0
    hubs = list(range(0, len(members), math.ceil(len(members) / HUBS)))
    excess = [_excess(member, [members[hub] for hub in hubs if hub != place]) for place, member in enumerate(members)]
    return (float(np.mean(excess)) - ORIGIN) * max(_agreement(members), 0.0) * group_variety(states_N)


def group_variety(states_N: States) -> float:
    """Return how far members do different things: from zero, where all do the same all the time or no two have sent as
    much as the first checkpoint, to one, where a twentieth of the sketches' variance lies between them."""
    members = _members(states_N)
    return min(max(_between(members) / APART, 0.0), 1.0) if len(members) > 1 else 0.0


def _members(states_N: States) -> list[Requests]:
    return [sampled(state) for state in states_N if state["sketched"] >= CHECKPOINTS[0]]


def _agreement(members: Sequence[Requests]) -> float:
    """Return whether the highest requests of all members differ from their others in the same way: the mean cosine of
    two members' differences, from one for the same way to about zero for ways of their own."""
    ways_NS = np.stack([_way(member) for member in members])
    ways_NS /= np.maximum(np.linalg.norm(ways_NS, axis=1, keepdims=True), 1e-9)
    count, total_S = len(members), ways_NS.sum(axis=0)
    return float(total_S @ total_S - (ways_NS**2).sum()) / (count * (count - 1))


def _way(member: Requests) -> NDArray[np.float32]:
    """Return the mean sketch of a member's highest requests less that of its others, [S]."""
    logits_K, sketch_KS = member
    order, few = np.argsort(-logits_K, kind="stable"), _few(logits_K)
    way_S: NDArray[np.float32] = sketch_KS[order[:few]].mean(axis=0) - sketch_KS[order[few:]].mean(axis=0)
    return way_S


def _few(logits_K: NDArray[np.float32]) -> int:
    return max(round(FEW * len(logits_K)), 1)


def _excess(member: Requests, others: Sequence[Requests]) -> float:
    """Return the mean logits of the most shared and of the highest requests, added, less that of all."""
    logits_K, sketch_KS = member
    few = _few(logits_K)
    shared = logits_K[np.argsort(_distance(sketch_KS, [sketch_MS for _, sketch_MS in others]), kind="stable")[:few]]
    return float(shared.mean() + np.sort(logits_K)[-few:].mean() - logits_K.mean())


def _distance(sketch_KS: NDArray[np.float32], others: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return how far the nearest request of the median other member is, squared, [K]; a canned request is no match for
    itself."""
    all_MS = np.concatenate(others)
    squares_K1, squares_M = (sketch_KS**2).sum(axis=1, keepdims=True), (all_MS**2).sum(axis=1)
    # Whole numbers below 2**24: exact, so that the same request is at distance zero.
    apart_KM = squares_K1 + squares_M - 2 * sketch_KS @ all_MS.T
    apart_KM[apart_KM == 0] = np.inf
    starts_H = np.cumsum([0, *map(len, others[:-1])])
    nearest: NDArray[np.float32] = np.median(np.minimum.reduceat(apart_KM, starts_H, axis=1), axis=1)
    return nearest


def _between(members: Sequence[Requests]) -> float:
    """Return the share of the sketches' variance that lies between members; about zero, also below, where none does."""
    means_NS = np.stack([sketch_KS.mean(axis=0) for _, sketch_KS in members])
    within_N = np.array([sketch_KS.var(axis=0, ddof=1).sum() for _, sketch_KS in members])
    sizes_N = np.array([len(logits_K) for logits_K, _ in members])
    between = means_NS.var(axis=0, ddof=1).sum() - (within_N / sizes_N).mean()
    return float(between / max(between + within_N.mean(), 1e-9))

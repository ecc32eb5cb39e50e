"""What linked accounts have in common, as one number: the score of a group.

What a campaign's accounts work on shows in all of them together, through each one's cover: in a template if it has one,
in the probe, and in requests that every account has and that resemble each other, among others that differ from account
to account; and it differs from every cover in the same way. An honest group with one subject has nothing but requests
that resemble each other, and one whose members do different things has none.

Shape letters: N members, K requests of a sample, M those of other members, H members that others are compared with.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.layout import CHECKPOINTS, States
from spider_sense.extraction.population import QUANTILES
from spider_sense.extraction.sample import sampled

__all__ = ["ALIKE", "COMMON", "Likeness", "group_likeness", "group_score", "group_shares"]

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
SAME = 8
"""Squared steps between sketches up to which two requests are one: 16-bit arithmetic moves a coordinate in thirty."""

Floats = NDArray[np.float32]
Requests = tuple[Floats, Floats]
"""Logits [K] and sketches [K, S] of one member."""


class Likeness(NamedTuple):
    """What the members of a group have in common, from the samples of their requests."""

    variety: float
    """How far they do different things: from zero, where all do the same all the time, to one, where a twentieth of the
    sketches' variance lies between them."""
    contrast: float
    """How high the probe is where they are alike (:func:`_height`, on average over requests), from where most honest
    groups lie below; times the agreement of what is high in each (:func:`_agreement`), and times the variety."""


def group_score(states_N: States) -> float:
    """Return the sum of the two shares, the first one up to a fifth, and a tenth of the contrast.

    Beyond a fifth, openings tell a product from a person, not a campaign from a product; where members do the same
    thing all the time they are a product's, and count half. It is -inf where neither two members nor all of them on
    average have sent as much as the first checkpoint of the level.
    """
    count = states_N["count"]
    if len(count) < 2 or max(np.sort(count)[-2], count.mean()) < CHECKPOINTS[0]:
        return -math.inf
    (alike, high), (variety, contrast) = group_shares(states_N), group_likeness(states_N)
    return min(alike, ALIKE) * (1 + variety) / 2 + high + WEIGHT * contrast


def group_shares(states_N: States) -> tuple[float, float]:
    """Return which shares of all requests of N members open alike, and have a campaign probe that is high among honest
    ones; zeros where there is nothing."""
    openings, counts = states_N["openings"].ravel(), states_N["opening_counts"].ravel()
    _, which = np.unique(openings, return_inverse=True)
    alike = float(np.bincount(which, counts).max()) / max(int(states_N["count"].sum()), 1)
    high = float(states_N["history"][:, RARE:].sum()) / max(int(states_N["sketched"].sum()), 1)
    return alike, high


def group_likeness(states_N: States) -> Likeness:
    """Return what N members have in common; nothing where no two have sent as much as the first checkpoint, and others
    are not looked at.

    A member counts by its requests, though no more than the second busiest: neither accounts that send little nor one
    that sends much hide the others.
    """
    enough = states_N[states_N["sketched"] >= CHECKPOINTS[0]]
    if len(enough) < 2:
        return Likeness(0.0, 0.0)
    members = [sampled(state) for state in enough]
    sent_N = enough["sketched"].astype(np.float64)
    weight_N = np.minimum(sent_N, np.sort(sent_N)[-2])
    hubs, heights = np.arange(0, len(members), math.ceil(len(members) / HUBS)), []
    for place, member in enumerate(members):
        others = hubs[hubs != place]
        heights.append(_height(member, [members[other] for other in others], weight_N[others]))
    height = float(np.average(heights, weights=weight_N)) - ORIGIN
    variety = min(max(_between(members) / APART, 0.0), 1.0)
    return Likeness(variety, height * max(_agreement(members, weight_N), 0.0) * variety)


def _agreement(members: Sequence[Requests], weight_N: NDArray[np.float64]) -> float:
    """Return whether the highest requests of all members differ from their others in the same way: the mean cosine of
    two members' differences, from one for the same way to about zero for ways of their own."""
    ways_NS = np.stack([_way(member) for member in members])
    ways_NS /= np.maximum(np.linalg.norm(ways_NS, axis=1, keepdims=True), 1e-9)
    weighted_NS = ways_NS * weight_N[:, None]
    total_S = weighted_NS.sum(axis=0)
    pairs = weight_N.sum() ** 2 - (weight_N**2).sum()
    return float((total_S @ total_S - (weighted_NS**2).sum()) / pairs)


def _way(member: Requests) -> Floats:
    """Return the mean sketch of a member's highest requests less that of its others, [S]."""
    logits_K, sketch_KS = member
    order, few = np.argsort(-logits_K, kind="stable"), _few(logits_K)
    way_S: Floats = sketch_KS[order[:few]].mean(axis=0) - sketch_KS[order[few:]].mean(axis=0)
    return way_S


def _few(logits_K: Floats) -> int:
    return max(round(FEW * len(logits_K)), 1)


def _height(member: Requests, others: Sequence[Requests], weight_H: NDArray[np.float64]) -> float:
    """Return the mean logit of the requests that others have too, and how far that of the highest lies above all."""
    logits_K, sketch_KS = member
    few = _few(logits_K)
    distance_K = _distance(sketch_KS, [sketch_MS for _, sketch_MS in others], weight_H)
    shared = logits_K[np.argsort(distance_K, kind="stable")[:few]]
    return float(shared.mean() + np.sort(logits_K)[-few:].mean() - logits_K.mean())


def _distance(sketch_KS: Floats, others: Sequence[Floats], weight_H: NDArray[np.float64]) -> Floats:
    """Return how far the nearest request of the median other member is, squared, [K]; a canned request is no match for
    itself."""
    all_MS = np.concatenate(others)
    squares_K1, squares_M = (sketch_KS**2).sum(axis=1, keepdims=True), (all_MS**2).sum(axis=1)
    # Whole numbers below 2**24, so this is exact.
    apart_KM = squares_K1 + squares_M - 2 * sketch_KS @ all_MS.T
    apart_KM[apart_KM <= SAME] = np.inf
    starts_H = np.cumsum([0, *map(len, others[:-1])])
    return _weighted_median(np.minimum.reduceat(apart_KM, starts_H, axis=1), weight_H)


def _weighted_median(value_KH: Floats, weight_H: NDArray[np.float64]) -> Floats:
    """Return the median of each row, [K]; the mean of the two in the middle where they share the weight."""
    order_KH = np.argsort(value_KH, axis=1)
    below_KH = np.cumsum(weight_H[order_KH], axis=1)
    half = weight_H.sum() / 2
    places = (below_KH >= half).argmax(axis=1), (below_KH > half).argmax(axis=1)
    lower_K, upper_K = (
        np.take_along_axis(value_KH, np.take_along_axis(order_KH, place_K[:, None], 1), 1)[:, 0] for place_K in places
    )
    return ((lower_K + upper_K) / 2).astype(np.float32)


def _between(members: Sequence[Requests]) -> float:
    """Return the share of the sketches' variance that lies between members; about zero, also below, where none does."""
    means_NS = np.stack([sketch_KS.mean(axis=0) for _, sketch_KS in members])
    within_N = np.array([sketch_KS.var(axis=0, ddof=1).sum() for _, sketch_KS in members])
    sizes_N = np.array([len(logits_K) for logits_K, _ in members])
    between = means_NS.var(axis=0, ddof=1).sum() - (within_N / sizes_N).mean()
    return float(between / max(between + within_N.mean(), 1e-9))

"""Tier 3: accounts that belong together, found by evidence that says nothing of the content.

Every principal keeps the smallest keyed hashes of each kind of evidence (a bottom-k MinHash sketch: two principals that
share evidence tend to keep the same of it). Hashes are the buckets in which candidate pairs meet. A pair's weight is a
sum of log-likelihood ratios, one for each kind, of its rarest common hash against meeting by chance; pairs above a
bound are joined. Only evidence of the account makes a pair: strangers who run one public benchmark share its system
prompt and its parameters. Those confirm a pair that has half of the weight. What scores a group, what its requests are
about, links nobody.

Shape letters: N principals, K kinds, L slots, P pairs.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.layout import EMPTY_LINK, LINK_KINDS, LinkKind, States
from spider_sense.extraction.likeness import group_score
from spider_sense.extraction.population import Population
from spider_sense.extraction.state import PrincipalState
from spider_sense.extraction.thresholds import EVERYBODY, HonestGroup

__all__ = [
    "ACCOUNT",
    "Edge",
    "Group",
    "group_tenant",
    "honest_groups",
    "judged",
    "kinds_needed",
    "linked",
    "stacked",
]

BOUND = -math.log(1e-6)
"""Weight from which a pair is joined: a chance of one in a million, as there are about N squared pairs."""
SHARED = 0.5
"""Probability that two accounts of one hand share a piece of evidence of a kind."""
HUBS = 32
"""Holders of a hash that every other holder is compared with, so that a large group costs no square."""
LEAST = BOUND / 2 / 3
"""Weight of the rarest hash of a pair that may be joined: three kinds of the account make up half of the bound."""
_AT_ONCE = 8192
"""Pairs that are compared at once."""

ACCOUNT: tuple[LinkKind, ...] = ("payment", "network", "client", "declared")
"""Kinds of evidence that join accounts."""
_CONTENT: tuple[LinkKind, ...] = ("parameters", "prefix")


_SHARED: Mapping[LinkKind, str] = {
    "payment": "a means of payment",
    "network": "a network",
    "client": "a client",
    "prefix": "a system prompt",
    "parameters": "sampling parameters",
}


@dataclass(frozen=True, slots=True)
class Edge:
    """Two principals that are joined, and why."""

    one: str
    other: str
    weight: float
    """Sum of log-likelihood ratios, in nats; infinite if the operator declared it."""
    kinds: tuple[LinkKind, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Principals that belong together."""

    members: tuple[str, ...]
    edges: tuple[Edge, ...]

    def evidence(self) -> str:
        """Say in words what joins them."""
        kinds = {kind for edge in self.edges for kind in edge.kinds}
        shared = [words for kind, words in _SHARED.items() if kind in kinds]
        said = [f"they share {', '.join(shared[:-1])}{' and ' if shared[1:] else ''}{shared[-1]}"] if shared else []
        said += ["the operator declared them to be one"] if "declared" in kinds else []
        return f"{len(self.members)} accounts belong together: {', and '.join(said)}"


def stacked(states: Mapping[str, PrincipalState]) -> States:
    """Return the states of N principals as one array, [N]."""
    return np.concatenate([state.states for state in states.values()])


def linked(states: Mapping[str, PrincipalState], population: Population) -> list[Group]:
    """Return the groups of two and more, the largest first.

    Args:
        states: by principal.
        population: says how rare a piece of evidence is among honest principals.
    """
    if not states:
        return []
    names = list(states)
    edges = list(_edges(names, stacked(states), population))
    parent = {name: name for edge in edges for name in (edge.one, edge.other)}
    for edge in edges:
        parent[_root(parent, edge.one)] = _root(parent, edge.other)
    members, joined = defaultdict(list), defaultdict(list)
    for name in parent:
        members[_root(parent, name)].append(name)
    for edge in edges:
        joined[_root(parent, edge.one)].append(edge)
    groups = [Group(tuple(sorted(members[root])), tuple(joined[root])) for root in members]
    return sorted(groups, key=lambda group: (-len(group.members), group.members))


def _root(parent: dict[str, str], name: str) -> str:
    while parent[name] != name:
        parent[name] = parent[parent[name]]
        name = parent[name]
    return name


def _edges(names: list[str], states_N: States, population: Population) -> Iterator[Edge]:
    """Yield the pairs that are joined."""
    links_NKL, kinds = states_N["links"], (*ACCOUNT, *_CONTENT)
    weights_NKL = _weights(links_NKL, population)
    pairs_P2 = _pairs(states_N, weights_NKL)
    # Most principals fill few slots.
    counting = {place: (weights_NKL[:, place] > 0).any(0) for place in map(LINK_KINDS.index, kinds)}
    evidence = [(links_NKL[:, place, slots], weights_NKL[:, place, slots]) for place, slots in counting.items()]
    for start in range(0, len(pairs_P2), _AT_ONCE):
        some = pairs_P2[start : start + _AT_ONCE]
        common_PK = np.stack([_common(*each, some) for each in evidence], 1)
        account_P = common_PK[:, : len(ACCOUNT)].sum(1)
        # What the account shows without the content needs no confirmation.
        common_PK[~((account_P >= BOUND / 2) & (account_P < BOUND)), len(ACCOUNT) :] = 0
        for row in np.flatnonzero(common_PK.sum(1) >= BOUND).tolist():
            one, other = some[row].tolist()
            found = tuple(kind for kind, weight in zip(kinds, common_PK[row], strict=True) if weight > 0)
            yield Edge(names[one], names[other], float(common_PK[row].sum()), found)


def _weights(links_NKL: NDArray[np.uint64], population: Population) -> NDArray[np.float64]:
    """Return the weight of each hash that at least two rows hold, [N, K, L]; of others 0.

    One of content is as common as here or among honest principals, if more so.
    """
    weights_NKL = np.zeros(links_NKL.shape)
    for kind in (*ACCOUNT, *_CONTENT):
        links_NL = links_NKL[:, LINK_KINDS.index(kind)]
        tokens, places, held = np.unique(links_NL, return_inverse=True, return_counts=True)
        weights = np.zeros(len(tokens))
        for at in np.flatnonzero((held > 1) & (tokens != EMPTY_LINK)).tolist():
            share = population.share(int(tokens[at]))
            share = max(share, held[at] / len(links_NL)) if kind in _CONTENT else share
            weights[at] = math.inf if kind == "declared" else max(_weight(share), 0.0)
        weights_NKL[:, LINK_KINDS.index(kind)] = weights[places].reshape(links_NL.shape)
    return weights_NKL


def _pairs(states_N: States, weights_NKL: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the pairs that may be joined, [P, 2]: they share a hash of the account that is rare enough."""
    found = []
    for place in map(LINK_KINDS.index, ACCOUNT):
        rows, slots = np.nonzero(weights_NKL[:, place] >= LEAST)
        tokens = states_N["links"][rows, place, slots]
        # Whom the others are compared with is drawn by hash: by age, a new account would never be.
        order = np.lexsort((states_N["seed"][rows] ^ tokens, tokens))
        rows, tokens = rows[order], tokens[order]
        for holders in np.split(rows, np.flatnonzero(tokens[1:] != tokens[:-1]) + 1):
            hub, other = np.triu_indices(min(len(holders), HUBS), 1, len(holders))
            one_two = np.sort(np.stack([holders[hub], holders[other]]), axis=0)
            found.append(one_two[0] * len(states_N) + one_two[1])
    return np.stack(np.divmod(np.unique(np.concatenate(found)), len(states_N)), 1)


def _common(
    links_NL: NDArray[np.uint64], weights_NL: NDArray[np.float64], pairs_P2: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the weight of the rarest hash that each pair shares, [P]."""
    one, other = pairs_P2.T
    shared_PL = (links_NL[one][:, :, None] == links_NL[other][:, None]).any(2)
    rarest_P: NDArray[np.float64] = np.where(shared_PL, weights_NL[one], 0).max(1, initial=0)
    return rarest_P


def _weight(share: float) -> float:
    """Return the log-likelihood ratio of sharing a hash: by one hand against by chance, where both hold it with the
    square of its share of principals."""
    return math.log(SHARED) - 2 * math.log(share)


def kinds_needed(population: Population) -> int:
    """Return how many kinds of evidence join two accounts where nobody of the fit had what they share."""
    return math.ceil(BOUND / max(_weight(1 / (population.principals + 1)), 1e-9))


def judged(states: Mapping[str, PrincipalState], population: Population) -> list[tuple[Group, str, float]]:
    """Return the linked groups, the tenant type that each is judged by, and its score."""
    found = []
    for group in linked(states, population):
        members = stacked({name: states[name] for name in group.members})
        found.append((group, group_tenant(members), group_score(members)))
    return found


def honest_groups(
    states: Mapping[str, PrincipalState], population: Population, work: Mapping[str, str]
) -> list[HonestGroup]:
    """Return the linked groups of calibration.

    Args:
        states: of honest principals.
        population: says how rare a piece of evidence is.
        work: what kind of work each does; empty where it is not known.
    """
    found = []
    for group, tenant, score in judged(states, population):
        found.append(HonestGroup(tenant, _work({work.get(name, "") for name in group.members}), score))
    return found


def _work(kinds: set[str]) -> str | None:
    """Return the kind of work that all members do; None if they differ, empty if that is not known."""
    named = kinds - {""}
    if len(named) > 1:
        return None
    return "" if "" in kinds else named.pop()


def group_tenant(states_N: States) -> str:
    """Return the tenant type that all members declare; the empty one of everybody if they differ."""
    names = np.unique(states_N["tenant"])
    return bytes(names[0]).decode("ascii") if len(names) == 1 else EVERYBODY

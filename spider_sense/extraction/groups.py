"""Tier 3: accounts that belong together, found by evidence that says nothing of the content.

Every principal keeps the smallest keyed hashes of each kind of evidence (a bottom-k MinHash sketch: two principals that
share evidence tend to keep the same of it). Hashes are the buckets in which candidate pairs meet. A pair's weight is a
sum of log-likelihood ratios, one for each kind, of its rarest common hash against meeting by chance; pairs above a
bound are joined. Only evidence of the account makes a pair: strangers who run one public benchmark share its system
prompt and its parameters. Those confirm a pair that has half of the weight. What scores a group, what its requests are
about, links nobody.

Shape letters: N principals, K kinds, L slots.
"""

import math
from collections import Counter, defaultdict
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
    edges = [edge for edge in _edges(names, stacked(states)["links"], population) if edge.weight >= BOUND]
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


def _edges(names: list[str], links_NKL: NDArray[np.uint64], population: Population) -> Iterator[Edge]:
    weights: dict[tuple[int, int], dict[LinkKind, float]] = defaultdict(dict)
    for kind in ACCOUNT:
        for token, holders in _buckets(links_NKL[:, LINK_KINDS.index(kind)]):
            weight = math.inf if kind == "declared" else _weight(population.share(token))
            for pair in _pairs(holders) if weight > 0 else ():
                weights[pair][kind] = max(weights[pair].get(kind, 0.0), weight)
    held = Counter(links_NKL[:, [LINK_KINDS.index(kind) for kind in _CONTENT]].ravel().tolist())
    for pair, kinds in weights.items():
        if BOUND / 2 <= sum(kinds.values()) < BOUND:
            kinds |= _confirmed(links_NKL[list(pair)], held, len(names), population)
        yield Edge(names[pair[0]], names[pair[1]], sum(kinds.values()), tuple(kinds))


def _confirmed(
    links_2KL: NDArray[np.uint64], held: Mapping[int, int], principals: int, population: Population
) -> dict[LinkKind, float]:
    """Return what the content of a pair adds; a hash is as common as here or among honest principals, if more so."""
    found: dict[LinkKind, float] = {}
    for kind in _CONTENT:
        one, other = (set(links_2KL[side, LINK_KINDS.index(kind)].tolist()) for side in (0, 1))
        shares = [max(population.share(t), held[t] / principals) for t in one & other - {int(EMPTY_LINK)}]
        if shares and _weight(min(shares)) > 0:
            found[kind] = _weight(min(shares))
    return found


def _buckets(links_NL: NDArray[np.uint64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield every hash that at least two rows hold, and the rows."""
    tokens, rows = links_NL.ravel(), np.repeat(np.arange(len(links_NL)), links_NL.shape[1])
    order = np.argsort(tokens, kind="stable")
    tokens, rows = tokens[order], rows[order]
    starts = np.flatnonzero(np.concatenate([[True], tokens[1:] != tokens[:-1]]))
    ends = np.append(starts[1:], len(tokens))
    shared = (ends - starts > 1) & (tokens[starts] != EMPTY_LINK)
    for start, end in zip(starts[shared].tolist(), ends[shared].tolist(), strict=True):
        yield int(tokens[start]), rows[start:end]


def _pairs(holders: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    for place, hub in enumerate(holders[:HUBS].tolist()):
        for other in holders[place + 1 :].tolist():
            yield hub, other


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
        found.append(HonestGroup(tenant, _common({work.get(name, "") for name in group.members}), score))
    return found


def _common(kinds: set[str]) -> str | None:
    """Return the kind of work that all members do; None if they differ, empty if that is not known."""
    named = kinds - {""}
    if len(named) > 1:
        return None
    return "" if "" in kinds else named.pop()


def group_tenant(states_N: States) -> str:
    """Return the tenant type that all members declare; the empty one of everybody if they differ."""
    names = np.unique(states_N["tenant"])
    return bytes(names[0]).decode("ascii") if len(names) == 1 else EVERYBODY

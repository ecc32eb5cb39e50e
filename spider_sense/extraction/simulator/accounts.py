"""Many accounts of one hand: organisations that are innocent, and campaigns spread over accounts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spider_sense.extraction.layout import LinkKind
from spider_sense.extraction.simulator.campaigns import Cover, Mixing, attacker, work_list
from spider_sense.extraction.simulator.families import Family
from spider_sense.extraction.simulator.tenants import Tenant, account_links
from spider_sense.extraction.simulator.traffic import Stream

__all__ = ["Evidence", "campaign_accounts", "organisation"]

_PROXIES = 5
"""Networks that a campaign's accounts come through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the accounts of a campaign share."""

    accounts_per_payment: int = 4
    """1 is a payment instrument for each account."""
    proxies: bool = True
    """Whether they share few and rare networks; else each has one of the world's."""
    one_client: bool = True
    """Whether they run one client of their own making; else each shows one of the world's."""


def organisation(name: str, tenants: Sequence[Tenant], requests: int, seed: int) -> tuple[Stream, ...]:
    """Return innocent accounts of one payer: a company with a key for each team, a school, a reseller.

    The members do what their tenants do; payment is one, network and client are shared by most.
    """
    generator = np.random.default_rng([seed, *name.encode()])
    office, client = f"{name}-office", f"{name}-client"
    members = []
    for tenant in tenants:
        own = dict(account_links(tenant.name, generator))
        links: list[tuple[LinkKind, str]] = [("payment", name)]
        links.append(("network", office if generator.random() < 0.8 else own["network"]))
        links.append(("client", client if generator.random() < 0.5 else own["client"]))
        members.append(tenant.stream(requests).linked(name, links))
    return tuple(members)


def campaign_accounts(
    name: str,
    campaign: Family,
    mixing: Mixing,
    covers: Callable[[Cover], Sequence[Tenant]],
    accounts: int,
    requests: int,
    seed: int,
    evidence: Evidence | None = None,
    texts: Sequence[Sequence[str]] | None = None,
) -> tuple[Stream, ...]:
    """Return the accounts that a campaign's work list is spread over, with what they share.

    Args:
        name: of the set of accounts.
        campaign: what they ask for.
        mixing: how each of them hides that.
        covers: as for :func:`attacker`.
        accounts: how many.
        requests: of each.
        seed: of the population.
        evidence: what they share.
        texts: the part of the list that each account works on, by default one list that all take from.
    """
    evidence = evidence or Evidence()
    generator = np.random.default_rng([seed, *name.encode()])
    shared = work_list(campaign, generator)
    parameters = (("temperature", 0.8), ("top_p", round(float(generator.uniform(0.85, 0.99)), 3)))
    streams = []
    for place in range(accounts):
        part = work_list(campaign, generator, texts[place % len(texts)]) if texts else shared
        stream = attacker(f"{name}-{place}", campaign, mixing, covers, requests, seed, texts=part)
        own = dict(account_links(stream.principal, generator))
        links: list[tuple[LinkKind, str]] = [
            ("payment", f"{name}-card{place // evidence.accounts_per_payment}"),
            ("network", f"{name}-proxy{generator.integers(_PROXIES)}" if evidence.proxies else own["network"]),
            ("client", f"{name}-client" if evidence.one_client else own["client"]),
        ]
        if evidence.one_client:
            stream = replace(stream, parameters=parameters)
        streams.append(stream.linked(name, links))
    return tuple(streams)

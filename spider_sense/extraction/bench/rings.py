"""Linked accounts: campaigns spread over accounts, among innocent organisations, with links that are measured."""

from collections.abc import Mapping, Sequence

from spider_sense.extraction.bench.ours import Ours
from spider_sense.extraction.bench.outcome import Outcome
from spider_sense.extraction.bench.scene import Scene
from spider_sense.extraction.simulator.accounts import Evidence
from spider_sense.extraction.simulator.traffic import Stream
from spider_sense.extraction.state import PrincipalState

__all__ = ["group_outcomes"]

_NOTHING_SHARED = Evidence(accounts_per_payment=1, proxies=False, one_client=False)

Accounts = Sequence[tuple[Stream, ...]]
States = Mapping[str, PrincipalState]
Linked = tuple[frozenset[str], float, bool]
"""Members of a group that was found, its score, and whether that is above the threshold."""


def group_outcomes(scene: Scene, ours: Ours) -> list[Outcome]:
    """Return what became of innocent organisations, of those with one subject, and of rings of each size; of rings
    behind narrow products, of rings that share nothing, of rings whose accounts have a topic each, and of accounts that
    share an innocent subject as a ring shares its campaign.

    A ring counts as found if the groups above the threshold hold half of its accounts and are mostly its own. Who is
    innocent counts as alarmed if such a group holds two of its accounts.
    """
    organisations, alike = scene.organisations("test"), scene.organisations("test", one_subject=True)
    innocent = {**_states(ours, organisations), **_states(ours, alike)}
    found = _judged(scene, ours, "organisations", organisations, innocent)
    found += _judged(scene, ours, "one subject", alike, innocent)
    scenes = [(f"ring of {size}", scene.campaign_groups(size)) for size in scene.config.ring_sizes]
    size, innocents = scene.config.ring_sizes[0], scene.split.families
    scenes += [
        (f"ring of {size}, products", scene.campaign_groups(size, cover="app")),
        (f"ring of {size}, nothing shared", scene.campaign_groups(size, _NOTHING_SHARED)),
        (
            f"ring of {size}, a topic each",
            scene.campaign_groups(size, parts=lambda campaign: ours.topics(campaign.wrapped(), size)),
        ),
        (f"innocent subject of {size}", scene.campaign_groups(size, campaigns=innocents["test", "chat"])),
        (
            f"innocent subject of {size}, products",
            scene.campaign_groups(size, cover="app", campaigns=innocents["test", "app"]),
        ),
    ]
    for name, rings in scenes:
        found += _judged(scene, ours, name, rings, {**innocent, **_states(ours, rings)})
    return found


def _states(ours: Ours, groups: Accounts) -> States:
    return ours.states([stream for accounts in groups for stream in accounts])


def _judged(scene: Scene, ours: Ours, name: str, groups: Accounts, states: States) -> list[Outcome]:
    linked = [
        (frozenset(group.members), score, score > ours.detector.threshold("group", tenant))
        for group, tenant, score in ours.groups(states)
    ]
    return [_outcome(scene, name, accounts, linked) for accounts in groups]


def _outcome(scene: Scene, name: str, accounts: Sequence[Stream], linked: Sequence[Linked]) -> Outcome:
    names, campaign = {stream.principal for stream in accounts}, accounts[0].campaign
    hostile = any(family.name == campaign for family in scene.campaigns())
    held = [(len(members & names), score, above) for members, score, above in linked if _mostly(members, names)]
    if hostile:
        alarmed = 2 * sum(count for count, _, above in held if above) >= len(names)
    else:
        alarmed = any(above and len(members & names) >= 2 for members, _, above in linked)
    most, score, _ = max(held, default=(0, 0.0, False))
    requests, kinds = sum(map(len, accounts)), {stream.tenant for stream in accounts}
    return Outcome(
        seed=scene.seed,
        system=Ours.name,
        embedding="hidden",
        scene=name,
        stratum=kinds.pop() if len(kinds) == 1 else "mixed",
        family=campaign or accounts[0].tenant,
        length=requests,
        alarm=requests if alarmed else None,
        tier="group" if alarmed else "",
        limit=requests if alarmed else None,
        score=score if 2 * most >= len(names) else None,
        template=any(family.name == campaign and family.has_template for family in scene.families),
    )


def _mostly(members: frozenset[str], names: set[str]) -> bool:
    return 2 * len(members & names) > len(members)

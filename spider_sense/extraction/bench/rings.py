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


def group_outcomes(scene: Scene, ours: Ours) -> list[Outcome]:
    """Return what became of innocent organisations and of rings of each size, of rings that share nothing, and of rings
    whose accounts have a topic each.

    A ring counts as found if the groups above the threshold hold half of its accounts and are mostly its own. An
    organisation counts as alarmed if such a group holds two of its accounts.
    """
    organisations = scene.organisations("test")
    innocent = _states(ours, organisations)
    found = _judged(scene, ours, "organisations", organisations, innocent)
    for size in scene.config.ring_sizes:
        rings = scene.campaign_groups(size)
        found += _judged(scene, ours, f"ring of {size}", rings, {**innocent, **_states(ours, rings)})
    size = scene.config.ring_sizes[0]
    for name, rings in (
        ("nothing shared", scene.campaign_groups(size, _NOTHING_SHARED)),
        ("a topic each", scene.campaign_groups(size, parts=lambda campaign: ours.topics(campaign.wrapped(), size))),
    ):
        found += _judged(scene, ours, f"ring of {size}, {name}", rings, {**innocent, **_states(ours, rings)})
    return found


def _states(ours: Ours, groups: Accounts) -> States:
    return ours.states([stream for accounts in groups for stream in accounts])


def _judged(scene: Scene, ours: Ours, name: str, groups: Accounts, states: States) -> list[Outcome]:
    threshold = ours.detector.threshold("group", "")
    flagged = [members for members, score in ours.groups(states) if score > threshold]
    found = []
    for accounts in groups:
        names = {stream.principal for stream in accounts}
        if accounts[0].campaign:
            caught = sum(len(names & group) for group in flagged if 2 * len(names & group) > len(group))
            alarmed = 2 * caught >= len(names)
        else:
            alarmed = any(len(names & group) >= 2 for group in flagged)
        requests = sum(map(len, accounts))
        found.append(
            Outcome(
                seed=scene.seed,
                system=ours.name,
                embedding="hidden",
                scene=name,
                stratum="group",
                family=accounts[0].campaign or accounts[0].tenant,
                length=requests,
                alarm=requests if alarmed else None,
                tier="group" if alarmed else "",
            )
        )
    return found

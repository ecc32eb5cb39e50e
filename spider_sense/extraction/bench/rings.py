"""Linked accounts: campaigns spread over accounts, among innocent organisations, with links that are measured."""

from collections.abc import Sequence

from spider_sense.extraction.bench.ours import Ours
from spider_sense.extraction.bench.outcome import Outcome
from spider_sense.extraction.bench.scene import Scene
from spider_sense.extraction.simulator.accounts import Evidence
from spider_sense.extraction.simulator.traffic import Stream

__all__ = ["group_outcomes"]

_NOTHING_SHARED = Evidence(accounts_per_payment=1, proxies=False, one_client=False)

Accounts = Sequence[tuple[Stream, ...]]


def group_outcomes(scene: Scene, ours: Ours) -> list[Outcome]:
    """Return what became of innocent organisations and of rings of each size, and of rings that share nothing.

    A ring counts as found if the groups above the threshold hold half of its accounts and are mostly its own. An
    organisation counts as alarmed if such a group holds two of its accounts.
    """
    organisations = scene.organisations("test")
    found = _judged(scene, ours, "organisations", organisations, [])
    for size in scene.config.ring_sizes:
        found += _judged(scene, ours, f"ring of {size}", [], scene.campaign_groups(size), organisations)
    size = scene.config.ring_sizes[0]
    hidden = scene.campaign_groups(size, _NOTHING_SHARED)
    return found + _judged(scene, ours, f"ring of {size}, nothing shared", [], hidden, organisations)


def _judged(
    scene: Scene, ours: Ours, name: str, innocent: Accounts, rings: Accounts, others: Accounts = ()
) -> list[Outcome]:
    threshold = ours.detector.threshold("group", "", scene.config.alpha)
    flagged = [members for members, score in ours.groups([*innocent, *rings, *others]) if score > threshold]
    found = []
    for accounts in (*innocent, *rings):
        names = {stream.principal for stream in accounts}
        if rings:
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

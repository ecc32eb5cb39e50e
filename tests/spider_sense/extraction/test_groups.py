"""Linked groups."""

import math
from dataclasses import replace
from typing import Any

from spider_sense.extraction.groups import group_tenant, honest_groups, kinds_needed, linked, stacked
from spider_sense.extraction.tiers import TieredDetector


def _holding(links: Any, streams: Any) -> Any:
    return [[replace(event, links=tuple(links)) for event in events] for events in streams]


def test_rare_shared_evidence_of_two_kinds_links(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    states = tiny_streams.states(
        uncalibrated, tiny_streams.honest(60, 40_000, 32) + tiny_streams.ring(("payment", "network"))
    )
    groups = linked(states, uncalibrated.population)
    assert [set(group.members) for group in groups] == [{f"ring{i}" for i in range(10)}]
    assert groups[0].evidence() == "10 accounts belong together: they share a means of payment and a network"


def test_one_kind_of_evidence_is_not_enough_unless_it_was_declared(
    uncalibrated: TieredDetector, tiny_streams: Any
) -> None:
    honest = tiny_streams.honest(60, 40_000, 32)
    assert (
        linked(tiny_streams.states(uncalibrated, honest + tiny_streams.ring(("network",))), uncalibrated.population)
        == []
    )
    declared = linked(
        tiny_streams.states(uncalibrated, honest + tiny_streams.ring(("declared",))), uncalibrated.population
    )
    assert [len(group.members) for group in declared] == [10]
    assert declared[0].edges[0].weight == math.inf
    assert declared[0].evidence() == "10 accounts belong together: the operator declared them to be one"


def test_what_honest_principals_share_links_nobody(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    # All of them draw their sampling parameters from the same five.
    states = tiny_streams.states(uncalibrated, tiny_streams.honest(80, 41_000, 32))
    assert linked(states, uncalibrated.population) == []
    assert linked({}, uncalibrated.population) == []


def test_what_a_public_template_tells_makes_no_link(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    """Strangers who run one benchmark that the fit did not know share template, system prompt, parameters and hour."""
    strangers = [
        [
            replace(event, opening=77, parameters=78, time=1e9 + turn, links=(("prefix", 79),))
            for turn, event in enumerate(e)
        ]
        for e in tiny_streams.honest(12, 45_000, 32)
    ]
    assert (
        linked(
            tiny_streams.states(uncalibrated, strangers + tiny_streams.honest(60, 40_000, 32)), uncalibrated.population
        )
        == []
    )


def test_content_confirms_what_the_account_began(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    ring = tiny_streams.ring(("network",))
    alike = [[replace(event, links=(*event.links, ("prefix", 79))) for event in events] for events in ring]
    honest = tiny_streams.honest(300, 40_000, 32)
    (group,) = linked(tiny_streams.states(uncalibrated, honest + alike), uncalibrated.population)
    assert set(group.members) == {f"ring{i}" for i in range(10)}
    assert "they share a network and a system prompt" in group.evidence()
    # Where everybody holds the system prompt it confirms nothing.
    everybody = [[replace(event, links=(("prefix", 79),)) for event in events] for events in honest]
    assert linked(tiny_streams.states(uncalibrated, everybody + alike), uncalibrated.population) == []


def test_a_large_group_is_found_whole(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    ring = [events[:8] for events in tiny_streams.ring(("payment", "client"), count=120)]
    groups = linked(tiny_streams.states(uncalibrated, ring), uncalibrated.population)
    assert [len(group.members) for group in groups] == [120]
    assert len(groups[0].edges) < 120 * 119 / 2


def test_who_came_last_is_linked_as_who_came_first(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    """A network that many hold counts for two who share a payment too, wherever they stand in the store."""
    network = ("network", tiny_streams.KEY.hash("network", "one hand"))
    neighbours = _holding([network], tiny_streams.honest(60, 40_000, 32))
    ring = tiny_streams.ring(("payment", "network"))
    for streams in (ring + neighbours, neighbours + ring):
        (group,) = linked(tiny_streams.states(uncalibrated, streams), uncalibrated.population)
        assert set(group.members) == {f"ring{i}" for i in range(10)}
        assert group.edges[0].kinds == ("payment", "network")


def test_what_many_hold_links_whoever_came_last(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    """Of the holders of a hash only some are compared with all others: drawn by hash, and not the oldest."""
    network, client = ((kind, tiny_streams.KEY.hash(kind, "many")) for kind in ("network", "client"))
    first = _holding([network], tiny_streams.honest(60, 40_000, 32))
    first += _holding([client], tiny_streams.honest(60, 41_000, 32))
    last = _holding([network, client], tiny_streams.honest(9, 42_000, 32))
    (group,) = linked(tiny_streams.states(uncalibrated, first + last), uncalibrated.population)
    assert set(group.members) == {events[0].principal for events in last}


def test_a_group_is_judged_by_what_all_its_members_declare(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    people, apps = (tiny_streams.honest(2, first, 32, tenant) for first, tenant in ((1, "chat"), (9, "app")))
    found = [group_tenant(stacked(tiny_streams.states(uncalibrated, some))) for some in (people, apps, people + apps)]
    assert found == ["chat", "app", ""]


def test_the_work_of_a_group_is_known_only_if_that_of_all_members_is(
    uncalibrated: TieredDetector, tiny_streams: Any
) -> None:
    states = tiny_streams.states(uncalibrated, tiny_streams.ring(("declared",), count=3))
    logs = {"one": ["a", "a", "a"], "none": [], "some": ["a", "a"], "two": ["a", "b"]}
    found = {
        name: honest_groups(states, uncalibrated.population, {f"ring{place}": kind for place, kind in enumerate(kinds)})
        for name, kinds in logs.items()
    }
    assert {name: group.work for name, (group,) in found.items()} == {"one": "a", "none": "", "some": "", "two": None}


def test_the_kinds_of_evidence_that_a_link_needs_fall_with_the_principals_of_the_fit(
    uncalibrated: TieredDetector, tiny_streams: Any
) -> None:
    needed = {count: kinds_needed(replace(uncalibrated.population, principals=count)) for count in (43, 44, 1413, 1414)}
    assert needed == {43: 3, 44: 2, 1413: 2, 1414: 1}
    honest = tiny_streams.honest(60, 40_000, 32)
    for count, kinds in ((1413, ("network", "client")), (1414, ("network",))):
        population = replace(uncalibrated.population, principals=count)
        states = tiny_streams.states(uncalibrated, honest + tiny_streams.ring(kinds))
        assert [len(group.members) for group in linked(states, population)] == [10]
        fewer = tiny_streams.states(uncalibrated, honest + tiny_streams.ring(kinds[1:]))
        assert linked(fewer, population) == []

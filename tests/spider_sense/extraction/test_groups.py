"""Linked groups."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from spider_sense.extraction import PrincipalState
from spider_sense.extraction.groups import group_tenant, honest_groups, kinds_needed, linked, stacked
from spider_sense.extraction.thresholds import CERTIFIED
from spider_sense.extraction.tiers import TieredDetector


def _states(detector: TieredDetector, streams: Any) -> dict[str, PrincipalState]:
    states = detector.replay(streams).states
    return {stream[0].principal: PrincipalState(states[row : row + 1]) for row, stream in enumerate(streams)}


def _ring(tiny_streams: Any, kinds: tuple[str, ...], count: int = 10, **how: Any) -> Any:
    links = [(kind, tiny_streams.KEY.hash(kind, "one hand")) for kind in kinds]
    return [tiny_streams.stream(f"ring{i}", 90_000 + i, 32, links=links, **how) for i in range(count)]


def test_rare_shared_evidence_of_two_kinds_links(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    states = _states(uncalibrated, tiny_streams.honest(60, 40_000, 32) + _ring(tiny_streams, ("payment", "network")))
    groups = linked(states, uncalibrated.population)
    assert [set(group.members) for group in groups] == [{f"ring{i}" for i in range(10)}]
    assert groups[0].evidence() == "10 accounts belong together: they share a means of payment and a network"


def test_one_kind_of_evidence_is_not_enough_unless_it_was_declared(
    uncalibrated: TieredDetector, tiny_streams: Any
) -> None:
    honest = tiny_streams.honest(60, 40_000, 32)
    assert linked(_states(uncalibrated, honest + _ring(tiny_streams, ("network",))), uncalibrated.population) == []
    declared = linked(_states(uncalibrated, honest + _ring(tiny_streams, ("declared",))), uncalibrated.population)
    assert [len(group.members) for group in declared] == [10]
    assert declared[0].edges[0].weight == math.inf
    assert declared[0].evidence() == "10 accounts belong together: the operator declared them to be one"


def test_what_honest_principals_share_links_nobody(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    # All of them draw their sampling parameters from the same five.
    states = _states(uncalibrated, tiny_streams.honest(80, 41_000, 32))
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
    assert linked(_states(uncalibrated, strangers + tiny_streams.honest(60, 40_000, 32)), uncalibrated.population) == []


def test_content_confirms_what_the_account_began(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    ring = _ring(tiny_streams, ("network",))
    alike = [[replace(event, links=(*event.links, ("prefix", 79))) for event in events] for events in ring]
    honest = tiny_streams.honest(300, 40_000, 32)
    (group,) = linked(_states(uncalibrated, honest + alike), uncalibrated.population)
    assert set(group.members) == {f"ring{i}" for i in range(10)}
    assert "they share a network and a system prompt" in group.evidence()
    # Where everybody holds the system prompt it confirms nothing.
    everybody = [[replace(event, links=(("prefix", 79),)) for event in events] for events in honest]
    assert linked(_states(uncalibrated, everybody + alike), uncalibrated.population) == []


def test_a_large_group_is_found_whole(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    ring = [events[:8] for events in _ring(tiny_streams, ("payment", "client"), count=120)]
    groups = linked(_states(uncalibrated, ring), uncalibrated.population)
    assert [len(group.members) for group in groups] == [120]
    assert len(groups[0].edges) < 120 * 119 / 2


def test_a_group_is_judged_by_what_all_its_members_declare(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    people, apps = (tiny_streams.honest(2, first, 32, tenant) for first, tenant in ((1, "chat"), (9, "app")))
    found = [group_tenant(stacked(_states(uncalibrated, some))) for some in (people, apps, people + apps)]
    assert found == ["chat", "app", ""]


def test_the_work_of_a_group_is_known_only_if_that_of_all_members_is(
    uncalibrated: TieredDetector, tiny_streams: Any
) -> None:
    states = _states(uncalibrated, _ring(tiny_streams, ("declared",), count=3))
    logs = {"one": ["a", "a", "a"], "none": [], "some": ["a", "a"], "two": ["a", "b"]}
    found = {
        name: honest_groups(states, uncalibrated.population, {f"ring{place}": kind for place, kind in enumerate(kinds)})
        for name, kinds in logs.items()
    }
    assert {name: group.work for name, (group,) in found.items()} == {"one": "a", "none": "", "some": "", "two": None}


def test_a_stratum_of_groups_has_its_own_threshold(detector: TieredDetector, tiny_streams: Any) -> None:
    """Groups that run one product must not hide a ring that poses as people."""
    calibration = detector.calibration
    assert calibration is not None
    people, apps = np.linspace(0, 0.2, CERTIFIED), np.linspace(0.5, 2, CERTIFIED)
    maxima = {"": np.sort([*people, *apps]), "chat": people}
    grouped = replace(calibration, maxima={**calibration.maxima, "group": maxima}, least={})
    judge = replace(detector, calibration=grouped)
    ring = _ring(tiny_streams, ("payment", "network"), attack_from=0, share=0.25)
    for tenant, limited in (("chat", 10), ("", 0)):
        states = _states(judge, [[replace(event, tenant=tenant) for event in events] for events in ring])
        found = [
            decision for decision in judge.review(states) if decision.tier == "group" and decision.level != "watch"
        ]
        assert len(found) == limited
        assert {decision.stratum for decision in found} <= {"chat"}


def test_a_review_limits_the_members_and_says_why(detector: TieredDetector, tiny_streams: Any) -> None:
    calibration = detector.calibration
    assert calibration is not None
    benign = np.linspace(0, 0.2, 300)
    grouped = replace(calibration, maxima={**calibration.maxima, "group": {"": benign}}, least={})
    judge = replace(detector, calibration=grouped)
    ring = _ring(tiny_streams, ("payment", "network"), attack_from=0, share=0.5)
    states = _states(judge, tiny_streams.honest(20, 43_000, 32) + ring)
    found = [decision for decision in judge.review(states) if decision.tier == "group"]
    assert {decision.principal for decision in found} == {f"ring{i}" for i in range(10)}
    assert {decision.level for decision in found} <= {"limit", "act"}
    assert found[0].group == tuple(sorted(f"ring{i}" for i in range(10)))
    assert found[0].evidence[0].startswith("10 accounts belong together: they share")
    assert any(
        "of their requests look like those that are sent to train another model" in one for one in found[0].evidence
    )
    assert "of 300 honest groups in calibration 0 look as much like it" in found[0].evidence


def test_a_group_without_any_to_compare_it_with_says_so(detector: TieredDetector, tiny_streams: Any) -> None:
    calibration = detector.calibration
    assert calibration is not None
    alone = replace(calibration, maxima={**calibration.maxima, "group": {"": np.zeros(0)}}, least={})
    judge = replace(detector, calibration=alone)
    states = _states(judge, _ring(tiny_streams, ("payment", "network"), attack_from=0, share=0.9))
    found = next(decision for decision in judge.review(states) if decision.tier == "group")
    assert (found.level, found.p_value) == ("watch", 1.0)
    assert found.evidence[-1] == "calibration had no honest group to compare them with"


def test_the_kinds_of_evidence_that_a_link_needs_fall_with_the_principals_of_the_fit(
    uncalibrated: TieredDetector, tiny_streams: Any
) -> None:
    needed = {count: kinds_needed(replace(uncalibrated.population, principals=count)) for count in (43, 44, 1413, 1414)}
    assert needed == {43: 3, 44: 2, 1413: 2, 1414: 1}
    honest = tiny_streams.honest(60, 40_000, 32)
    for count, kinds in ((1413, ("network", "client")), (1414, ("network",))):
        population = replace(uncalibrated.population, principals=count)
        states = _states(uncalibrated, honest + _ring(tiny_streams, kinds))
        assert [len(group.members) for group in linked(states, population)] == [10]
        fewer = _states(uncalibrated, honest + _ring(tiny_streams, kinds[1:]))
        assert linked(fewer, population) == []


def test_a_sweep_split_over_linked_accounts_is_one_sweep(detector: TieredDetector, tiny_streams: Any) -> None:
    payment = ("declared", tiny_streams.KEY.hash("declared", "reseller"))
    streams = []
    for account in range(10):
        ids = [[(account * 6 + turn) * 20 + i for i in range(20)] for turn in range(6)]
        events = tiny_streams.biased(f"part{account}", ids)
        streams.append([replace(event, links=(payment,)) for event in events])
    states = _states(detector, streams)
    assert not (detector.rules.judge(stacked(states)) > 0).any()
    found = [decision for decision in detector.review(states) if decision.tier == "rule"]
    assert len(found) == 10
    assert found[0].level == "act"


def test_a_review_selects_principals_with_few_honest_ones_among_them(
    detector: TieredDetector, tiny_streams: Any
) -> None:
    attackers = [tiny_streams.stream(f"a{i}", 60_000 + i, 64, attack_from=0) for i in range(30)]
    states = _states(detector, tiny_streams.honest(30, 44_000, 64) + attackers)
    chosen = {decision.principal for decision in detector.review(states) if decision.level == "act"}
    assert sum(name.startswith("a") for name in chosen) >= 25
    assert sum(name.startswith("honest") for name in chosen) <= 4


def test_one_that_crossed_nothing_is_not_selected_for_being_among_few(
    detector: TieredDetector, tiny_streams: Any
) -> None:
    """Of one principal alone, 5% of false discoveries are 5% of honest ones; the budget allows 1% to be limited."""
    states = detector.replay(tiny_streams.honest(1, 44_000, 64)).states
    assert detector.calibration is not None
    states["level"] = np.quantile(detector.calibration.maxima["level"][""], 0.985)
    assert detector.watch("level", "") < states["level"][0] < detector.threshold("level", "")
    assert detector.calibration.p_value("level", "", states["level"][0]) < 0.025
    assert detector.review({"alone": PrincipalState(states)}) == ()


def test_groups_are_watched_where_calibration_had_too_few(detector: TieredDetector, tiny_streams: Any) -> None:
    assert detector.calibration is not None
    assert len(detector.calibration.maxima["group"][""]) == 0
    ring = _states(detector, _ring(tiny_streams, ("payment", "network"), attack_from=0, share=0.5))
    found = [decision for decision in detector.review(ring) if decision.tier == "group"]
    assert {(decision.principal, decision.level) for decision in found} == {(f"ring{i}", "watch") for i in range(10)}

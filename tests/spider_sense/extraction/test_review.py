"""A review of the whole population: findings about groups, and whom it selects."""

from dataclasses import replace
from typing import Any

import numpy as np

from spider_sense.extraction import PrincipalState
from spider_sense.extraction.groups import stacked
from spider_sense.extraction.review import review
from spider_sense.extraction.thresholds import CERTIFIED
from spider_sense.extraction.tiers import TieredDetector


def test_a_stratum_of_groups_has_its_own_threshold(detector: TieredDetector, tiny_streams: Any) -> None:
    """Groups that run one product must not hide a ring that poses as people."""
    calibration = detector.calibration
    assert calibration is not None
    people, apps = np.linspace(0, 0.2, CERTIFIED), np.linspace(0.5, 2, CERTIFIED)
    maxima = {"": np.sort([*people, *apps]), "chat": people}
    grouped = replace(calibration, maxima={**calibration.maxima, "group": maxima}, least={})
    judge = replace(detector, calibration=grouped)
    ring = tiny_streams.ring(("payment", "network"), attack_from=0, share=0.25)
    for tenant, limited in (("chat", 10), ("", 0)):
        states = tiny_streams.states(judge, [[replace(event, tenant=tenant) for event in events] for events in ring])
        found = [
            decision for decision in review(judge, states) if decision.tier == "group" and decision.level != "watch"
        ]
        assert len(found) == limited
        assert {decision.stratum for decision in found} <= {"chat"}


def test_a_review_limits_the_members_and_says_why(detector: TieredDetector, tiny_streams: Any) -> None:
    calibration = detector.calibration
    assert calibration is not None
    benign = np.linspace(0, 0.2, 300)
    grouped = replace(calibration, maxima={**calibration.maxima, "group": {"": benign}}, least={})
    judge = replace(detector, calibration=grouped)
    ring = tiny_streams.ring(("payment", "network"), attack_from=0, share=0.5)
    states = tiny_streams.states(judge, tiny_streams.honest(20, 43_000, 32) + ring)
    found = [decision for decision in review(judge, states) if decision.tier == "group"]
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
    states = tiny_streams.states(judge, tiny_streams.ring(("payment", "network"), attack_from=0, share=0.9))
    found = next(decision for decision in review(judge, states) if decision.tier == "group")
    assert (found.level, found.p_value) == ("watch", 1.0)
    assert found.evidence[-1] == "calibration had no honest group to compare them with"


def test_a_sweep_split_over_linked_accounts_is_one_sweep(detector: TieredDetector, tiny_streams: Any) -> None:
    payment = ("declared", tiny_streams.KEY.hash("declared", "reseller"))
    streams = []
    for account in range(10):
        ids = [[(account * 6 + turn) * 20 + i for i in range(20)] for turn in range(6)]
        events = tiny_streams.biased(f"part{account}", ids)
        streams.append([replace(event, links=(payment,)) for event in events])
    states = tiny_streams.states(detector, streams)
    assert not (detector.rules.judge(stacked(states)) > 0).any()
    found = [decision for decision in review(detector, states) if decision.tier == "rule"]
    assert len(found) == 10
    assert found[0].level == "act"


def test_a_review_selects_principals_with_few_honest_ones_among_them(
    detector: TieredDetector, tiny_streams: Any
) -> None:
    attackers = [tiny_streams.stream(f"a{i}", 60_000 + i, 64, attack_from=0) for i in range(30)]
    states = tiny_streams.states(detector, tiny_streams.honest(30, 44_000, 64) + attackers)
    chosen = {decision.principal for decision in review(detector, states) if decision.level == "act"}
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
    assert review(detector, {"alone": PrincipalState(states)}) == ()


def test_groups_are_watched_where_calibration_had_too_few(detector: TieredDetector, tiny_streams: Any) -> None:
    assert detector.calibration is not None
    assert len(detector.calibration.maxima["group"][""]) == 0
    ring = tiny_streams.states(detector, tiny_streams.ring(("payment", "network"), attack_from=0, share=0.5))
    found = [decision for decision in review(detector, ring) if decision.tier == "group"]
    assert {(decision.principal, decision.level) for decision in found} == {(f"ring{i}", "watch") for i in range(10)}

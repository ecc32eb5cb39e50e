"""The detector as a whole."""

from typing import Any

import numpy as np
import pytest

from spider_sense.errors import DataError
from spider_sense.extraction import Decision
from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.features import looks
from spider_sense.extraction.layout import CHECKPOINTS, EVERY
from spider_sense.extraction.population import Population
from spider_sense.extraction.tiers import TieredDetector


def _decisions(detector: TieredDetector, events: Any) -> list[Decision]:
    state = detector.open(events[0].principal)
    found: list[Decision] = []
    for event in events:
        state, new = detector.update(state, event)
        found += new
    return found


def test_honest_principals_are_alarmed_at_about_the_budget(detector: TieredDetector, tiny_streams: Any) -> None:
    replay = detector.replay(tiny_streams.honest(300, 50_000, 96))
    for tier in ("own", "level"):
        # Binomial with 300 principals at 1%, and the threshold's own spread: more than 9 has a chance below 1 in 50.
        assert (replay.states[tier] > detector.threshold(tier, "")).sum() <= 9


def test_a_pivot_is_found_by_own_history(detector: TieredDetector, tiny_streams: Any) -> None:
    replay = detector.replay([tiny_streams.stream(f"p{i}", 70_000 + i, 120, attack_from=60) for i in range(20)])
    crossed = replay.own_NT > detector.threshold("own", "")
    delay = np.where(crossed.any(axis=1), crossed.argmax(axis=1) - 59, np.inf)
    assert np.median(delay) <= 24
    assert crossed[:, :60].sum() == 0


def test_an_attack_from_the_first_request_is_found_by_its_level(detector: TieredDetector, tiny_streams: Any) -> None:
    replay = detector.replay(tiny_streams.attackers(30, 200_000, 64))
    crossed = replay.level_NT > detector.threshold("level", "")
    assert (crossed[:, 31].reshape(-1, 3).mean(axis=0)[:2] >= 0.9).all()  # pure and half
    assert crossed[:, :15].sum() == 0  # before the first checkpoint


def test_a_campaign_that_begins_after_the_last_checkpoint_is_acted_on(
    detector: TieredDetector, tiny_streams: Any
) -> None:
    late = [tiny_streams.stream(f"late{i}", 70_000 + i, 1400, attack_from=1100) for i in range(5)]
    replay, threshold = detector.replay(late), detector.threshold("level", "")
    assert (replay.level_NT[:, 1099] <= threshold).all()
    assert (replay.level_NT[:, -1] > threshold).all()
    found = _decisions(detector, late[0])
    act = [decision for decision in found if decision.level == "act"]
    assert {decision.tier for decision in act} == {"own", "level"}
    assert 1100 < act[0].count <= 1100 + 2 * EVERY
    assert f"after {act[0].count} requests the principal looks unlike honest ones" in "; ".join(act[0].evidence)


def test_long_honest_lives_come_no_higher(detector: TieredDetector, tiny_streams: Any) -> None:
    replay = detector.replay(tiny_streams.honest(20, 50_000, 1600))
    watched = replay.level_NT > detector.watch("level", "")
    assert watched[:, 1023].sum() == watched[:, -1].sum() <= 3


def test_the_fit_and_the_detector_look_at_the_same_places(tiny_streams: Any) -> None:
    honest = tiny_streams.honest(50, 0, 1300)
    population = Population.fit(honest, tiny_streams.KEY, tiny_streams.PROBE_NAMES)
    states = TieredDetector(population, None, tiny_streams.KEY, 576).replay(honest).states
    assert states["level"].max() == population.floors[""]
    assert states["level_at"].max() > CHECKPOINTS[-1]
    counts = np.arange(2000, dtype=np.uint32)
    assert counts[looks(counts)].tolist() == [*CHECKPOINTS, *range(1152, 2000, EVERY)]


def test_a_replay_says_what_single_updates_say(detector: TieredDetector, tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 3, 90, attack_from=50)
    replay, state = detector.replay([events, tiny_streams.stream("b", 4, 30)]), detector.open("a")
    for turn, event in enumerate(events):
        state, _ = detector.update(state, event)
        assert (replay.own_NT[0, turn], replay.level_NT[0, turn]) == (state.states["own"][0], state.states["level"][0])
    assert np.isnan(replay.own_NT[1, 30:]).all()
    assert np.isfinite(replay.level_NT[1, 29])


def test_each_level_is_decided_once_and_two_tiers_act(detector: TieredDetector, tiny_streams: Any) -> None:
    found = _decisions(detector, tiny_streams.stream("a", 7, 128, attack_from=40))
    assert len({(decision.tier, decision.level) for decision in found}) == len(found)
    assert {decision.tier for decision in found if decision.level == "act"} == {"own", "level"}
    own = next(decision for decision in found if decision.tier == "own" and decision.level == "act")
    assert own.score > own.threshold == detector.threshold("own", "")
    assert own.p_value is not None
    assert own.p_value <= 0.01
    assert own.certified
    assert "no longer look like the principal's own" in own.evidence[0]
    level = next(decision for decision in found if decision.tier == "level")
    assert "campaign probe" in level.evidence[0]


def test_a_turn_alone_is_watched_and_limits_with_a_high_level(detector: TieredDetector, tiny_streams: Any) -> None:
    own, watch = detector.threshold("own", ""), detector.watch("level", "")
    assert watch < detector.threshold("level", "")
    states = np.repeat(detector.replay([tiny_streams.stream("a", 7, 20)]).states, 3)
    states["decided"] = 0
    batch = EventBatch.of([tiny_streams.stream("a", 7, 20)[-1]] * 3)
    states["own"], states["level"] = [own + 1, own + 1, own - 1e-6], [watch, watch + 1e-6, watch + 1e-6]
    _, found = detector.step(states, batch, ["turned", "both", "level"])
    assert {(one.principal, one.tier, one.level) for one in found} == {
        ("turned", "own", "watch"),
        ("both", "own", "limit"),
        ("both", "level", "watch"),
        ("level", "level", "watch"),
    }
    both = next(one for one in found if one.principal == "both" and one.tier == "own")
    assert "campaign probe" in both.evidence[-1]


def test_without_calibration_nothing_is_limited(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    found = _decisions(uncalibrated, tiny_streams.stream("a", 7, 128, attack_from=40))
    assert {decision.level for decision in found} == {"watch"}
    assert not any(decision.certified for decision in found)


def test_requests_without_activations_are_counted_and_bet_on_nothing(
    detector: TieredDetector, tiny_streams: Any
) -> None:
    from dataclasses import replace

    blind = [replace(event, sketch=None, probes=None) for event in tiny_streams.stream("a", 1, 64)]
    states = detector.replay([blind]).states
    assert states["count"][0] == 64
    assert states["sketched"][0] == 0
    assert states["own"][0] == states["level"][0] == -np.inf


@pytest.mark.parametrize("streams", [[[]], None])
def test_streams_of_nobody_or_of_two_are_refused(detector: TieredDetector, tiny_streams: Any, streams: Any) -> None:
    mixed = [[tiny_streams.stream("a", 1, 1)[0], tiny_streams.stream("b", 1, 1)[0]]]
    with pytest.raises(DataError, match="stream 0 holds events of"):
        detector.replay(streams or mixed)

"""What scores a group."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spider_sense.extraction import likeness
from spider_sense.extraction.layout import SAMPLE, SKETCH, States
from spider_sense.extraction.likeness import ALIKE, HUBS, group_likeness, group_score, group_shares
from spider_sense.extraction.sample import STEP
from spider_sense.extraction.state import fresh
from spider_sense.extraction.tiers import TieredDetector

FEW = SAMPLE // 4
"""Requests of the second subject."""


def _contrast(states: States) -> float:
    return group_likeness(states).contrast


def _variety(states: States) -> float:
    return group_likeness(states).variety


def _ring(tiny_streams: Any, count: int = 10, **how: Any) -> Any:
    return [tiny_streams.stream(f"ring{i}", 90_000 + i, 32, **how) for i in range(count)]


def _states(detector: TieredDetector, streams: Any) -> States:
    return detector.replay(streams).states


def _group(own: float, second: float, logit: float, members: int = 10, spread: float = 1.0) -> States:
    """Return members whose own subject lies ``own`` from the others', in standard deviations of its requests, and who
    share a second one, at ``second`` from it and with a probe that is ``logit`` higher."""
    rng = np.random.default_rng(0)
    states = fresh(list(range(members)))
    x = rng.normal(0, spread, (members, SAMPLE, SKETCH)) + own * rng.normal(0, 1, (members, 1, SKETCH))
    x[:, :FEW] = rng.normal(0, spread, (members, FEW, SKETCH)) + second
    logits = rng.normal(0, 0.5, (members, SAMPLE))
    logits[:, :FEW] += logit
    states["sample"], states["sample_logits"] = np.clip(np.rint(x / STEP), -127, 127), logits
    states["count"] = states["sketched"] = SAMPLE
    return states


def test_what_members_share_behind_subjects_of_their_own_stands_out() -> None:
    ring = _contrast(_group(own=1, second=2, logit=6))
    assert ring > 2 * 6 - 6 / 4 - 1  # the shared and the highest, less a quarter that is higher
    # With the same logits: nothing that is shared, and nothing but that.
    alone = _group(own=1, second=2, logit=6)
    alone["sample"][:, :FEW] = _group(own=1, second=0, logit=0)["sample"][::-1, FEW:][:, :FEW]
    assert _contrast(alone) < 0.7 * ring
    assert _contrast(_group(own=0, second=0, logit=6)) < 0.3 * ring


def test_what_is_high_in_a_way_of_each_account_s_own_is_no_campaign() -> None:
    ring, apart = _group(own=1, second=2, logit=6), _group(own=1, second=2, logit=6)
    apart["sample"][::2] *= -1  # half of them differ from their others the other way about
    assert _contrast(ring) > 8
    assert _contrast(apart) == 0


def test_openings_count_half_where_all_do_the_same() -> None:
    product, ring = _group(own=0, second=0, logit=0), _group(own=1, second=2, logit=0)
    assert _variety(product) < 0.2 < _variety(ring) == 1
    for states, low, high in ((product, 0.5, 0.6), (ring, 1, 1)):
        before = group_score(states)
        states["openings"][:, 0], states["opening_counts"][:, 0] = 7, SAMPLE
        assert low * ALIKE <= group_score(states) - before + 1e-9 <= high * ALIKE + 2e-9


def test_a_shared_subject_that_is_no_campaign_tells_little() -> None:
    assert _contrast(_group(own=1, second=2, logit=0)) < 2


def test_a_canned_request_is_no_match_for_itself() -> None:
    honest = _group(own=1, second=0, logit=0)
    canned = honest.copy()
    canned["sample"][:, :FEW] = np.random.default_rng(1).integers(-12, 24, (FEW, SKETCH))  # the same for all
    canned["sample_logits"][:, :FEW] += 3
    varied = canned.copy()
    varied["sample"][:, :FEW, :16] += np.random.default_rng(2).integers(0, 3, (10, FEW, 16), dtype=np.int8)
    assert _contrast(canned) < _contrast(varied) - 1


def test_a_canned_request_is_the_same_in_sixteen_bits() -> None:
    rng = np.random.default_rng(1)
    canned = _group(own=1, second=0, logit=0)
    exact = canned["sample"].astype(np.float64)
    exact[:, :FEW] = rng.normal(0, 4, (FEW, SKETCH))
    canned["sample_logits"][:, :FEW] += 3
    found = []
    for noise in (0.0, 0.01):  # of a standard deviation
        canned["sample"] = np.rint(exact + rng.normal(0, noise / STEP, exact.shape))
        found.append(_contrast(canned))
    assert (canned["sample"][0] != canned["sample"][1])[:FEW].any()
    assert found[1] == pytest.approx(found[0], abs=0.2)


def test_neither_accounts_that_send_little_nor_one_that_sends_much_hide_a_ring() -> None:
    ring = _group(own=1, second=2, logit=6)
    ring["count"] = ring["sketched"] = 1000
    decoys = _group(own=1, second=2, logit=0, members=20)
    decoys["sample"] = np.random.default_rng(5).integers(-9, 9, decoys["sample"].shape)
    decoys["count"] = decoys["sketched"] = 16
    assert _contrast(np.concatenate([ring, decoys])) > 0.9 * _contrast(ring)
    busy = decoys[:1].copy()
    busy["count"] = busy["sketched"] = 100_000
    assert _contrast(np.concatenate([ring, busy])) > 0.7 * _contrast(ring)
    decoys["count"] = decoys["sketched"] = 1000
    assert _contrast(np.concatenate([ring, decoys])) < 0.5 * _contrast(ring)


def test_a_large_group_is_compared_with_few_and_scored_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    distance = likeness._distance

    def counted(sketch: Any, others: Any, weight: Any) -> Any:
        compared.append(len(others))
        return distance(sketch, others, weight)

    monkeypatch.setattr(likeness, "_distance", counted)
    small, large = (_contrast(_group(own=1, second=2, logit=6, members=count)) for count in (HUBS, 10 * HUBS))
    assert large == pytest.approx(small, abs=0.5)
    assert max(compared) == HUBS


def test_a_group_without_two_that_sent_enough_has_no_contrast() -> None:
    states = _group(own=1, second=2, logit=6)
    states["sketched"][1:] = 15
    assert _contrast(states) == 0


def test_diluted_campaigns_stand_out_together_and_not_alone(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    ring = _states(uncalibrated, _ring(tiny_streams, attack_from=0, share=0.25))
    honest = [_states(uncalibrated, tiny_streams.honest(10, 42_000 + 10 * i, 32)) for i in range(20)]
    assert group_score(ring) > max(map(group_score, honest)) + 0.2
    assert group_score(ring[:1]) == -math.inf
    early = [events[:10] for events in _ring(tiny_streams, attack_from=0)]
    assert group_score(_states(uncalibrated, early)) == -math.inf


def test_accounts_that_send_almost_nothing_hide_no_group(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    ring = _ring(tiny_streams, attack_from=0, share=0.5)
    idle = [
        [replace(event, principal=f"idle{number}") for event in events[:1]]
        for number, events in enumerate(_ring(tiny_streams, count=40, attack_from=0))
    ]
    alone = group_score(_states(uncalibrated, ring))
    assert group_score(_states(uncalibrated, ring + idle)) > 0.9 * alone > 0


def test_a_group_is_scored_by_what_its_requests_have_in_common(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    attacks = _ring(tiny_streams, attack_from=0, share=0.5)
    states = _states(uncalibrated, attacks)
    sent = np.array([event.opening == tiny_streams.TEMPLATE for events in attacks for event in events])
    alike, high = group_shares(states)
    assert alike == pytest.approx(sent.mean(), abs=0.05)  # the counters forget a little
    assert high == pytest.approx(sent.mean(), abs=0.1)
    apart = states.copy()
    apart["openings"] += np.arange(len(states), dtype=np.uint64)[:, None]  # each account has words of its own
    assert group_shares(apart)[0] < alike / 5
    assert group_score(apart) < group_score(states)

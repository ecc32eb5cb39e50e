"""What a request adds to the counters, and the features read off them, against plain numpy."""

from dataclasses import replace
from typing import Any

import numpy as np

from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.features import TOP, mean_probe, mean_sketch, vector
from spider_sense.extraction.layout import EMPTY_LINK, LINK_KINDS, States
from spider_sense.extraction.profile import half_of, record
from spider_sense.extraction.state import fresh
from spider_sense.extraction.tiers import TieredDetector


def _recorded(events: Any, seed: int = 5) -> tuple[States, list[int]]:
    states, halves = fresh([seed]), []
    for event in events:
        halves.append(int(half_of(states)[0]))
        record(states, EventBatch.of([event]), salt=1)
    return states, halves


def test_moments_are_sums_by_half(tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 1, 60, attack_from=30)
    states, halves = _recorded(events)
    assert 15 < sum(halves) < 45
    for half in (0, 1):
        mine = [event for event, its in zip(events, halves, strict=True) if its == half]
        moments = states["moments"][0, half]
        probes = np.clip([event.probes for event in mine], -4, 4)
        assert moments["count"] == len(mine)
        np.testing.assert_allclose(moments["sketch"], np.sum([event.sketch for event in mine], axis=0), atol=1e-4)
        np.testing.assert_allclose(moments["probe"], probes[:, 0].sum(), rtol=1e-5)


def test_features_are_what_their_names_say(detector: TieredDetector, tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 1, 64, attack_from=20)
    mean, top, opening = vector(detector.replay([events]).states, detector.population.centres)[0]
    probe = np.array([event.probes[0] for event in events])
    np.testing.assert_allclose(mean, np.clip(probe, -4, 4).mean(), rtol=1e-5)
    # Read off a histogram, whose last bin stands for what honest requests have there.
    highest = np.sort(np.minimum(probe, detector.population.centres[-1]))[-round(TOP * 64) :]
    assert abs(top - highest.mean()) < 0.3
    np.testing.assert_allclose(opening, sum(e.opening == tiny_streams.TEMPLATE for e in events) / 64, atol=0.1)


def test_a_member_is_described_by_its_scoring_half(tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 1, 60, attack_from=30)
    states, halves = _recorded(events)
    mine = [event for event, half in zip(events, halves, strict=True) if half == 1]
    np.testing.assert_allclose(mean_probe(states)[0], np.clip([e.probes[0] for e in mine], -4, 4).mean(), rtol=1e-4)
    np.testing.assert_allclose(mean_sketch(states)[0], np.mean([event.sketch for event in mine], axis=0), atol=1e-5)


def test_link_evidence_of_requests_comes_from_the_linking_half(tiny_streams: Any) -> None:
    links = [("payment", 77), ("prefix", 88)]
    states, halves = _recorded(tiny_streams.stream("a", 1, 40, links=links))
    kept = {kind: states["links"][0, index] for index, kind in enumerate(LINK_KINDS)}
    assert kept["payment"].tolist() == [77] + [int(EMPTY_LINK)] * 15
    assert kept["prefix"][0] == 88
    linking = [e for e, half in zip(tiny_streams.stream("a", 1, 40), halves, strict=True) if half == 0]
    expected = sorted({event.opening for event in linking})[:16]
    assert kept["template"][: len(expected)].tolist() == expected
    assert (np.diff(kept["activity"].astype(np.float64)) >= 0).all()
    # A principal whose only request scores leaves no evidence but its account's.
    seed = next(seed for seed in range(100) if half_of(fresh([seed]))[0] == 1)
    only, _ = _recorded(tiny_streams.stream("a", 1, 1, links=links), seed)
    assert (only["links"] != EMPTY_LINK).sum() == 1


def test_known_lists_are_counted(tiny_streams: Any) -> None:
    events = [
        replace(event, known_list=index % 3 - 1)
        for index, event in enumerate(tiny_streams.stream("a", 1, 9))
    ]
    states, _ = _recorded(events)
    assert states["list_hits"][0, :2].tolist() == [3, 3]

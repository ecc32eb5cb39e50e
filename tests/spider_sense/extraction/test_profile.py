"""What a request adds to the counters, and the features read off them, against plain numpy."""

from dataclasses import replace
from typing import Any

import numpy as np

from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.features import FEATURES, GROUP_FEATURES, TOP, mean_sketch, member_vector, vector
from spider_sense.extraction.layout import EMPTY_LINK, LINK_KINDS, PROBES, States
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
        np.testing.assert_allclose(moments["probe_squared"], (probes[:, 0] ** 2).sum(), rtol=1e-5)
        np.testing.assert_array_equal(moments["probe_high"], (probes[:, 0] > 2).sum())


def test_features_are_what_their_names_say(detector: TieredDetector, tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 1, 64, attack_from=20)
    states = detector.replay([events]).states
    found = dict(zip(FEATURES, vector(states, detector.population.centres)[0], strict=True))
    sketch, probes = np.array([event.sketch for event in events]), np.array([event.probes for event in events])
    lengths = np.log1p([event.tokens for event in events])
    np.testing.assert_allclose(found["probe positive"], (probes[:, 0] > 0).mean())
    np.testing.assert_allclose(found["probe sd"], np.clip(probes[:, 0], -4, 4).std(), atol=1e-5)
    # Read off a histogram, whose last bin stands for what honest requests have there.
    top = np.sort(np.minimum(probes[:, 0], detector.population.centres[0, -1]))[-round(TOP * 64) :].mean()
    assert abs(found["probe top decile"] - top) < 0.3
    cells = {tuple(row) for row in (sketch[:, :12] > 0).tolist()}
    np.testing.assert_allclose(found["share of cells"], len(cells) / 64)
    once = sum(((sketch[:, :12] > 0) == np.array(cell)).all(axis=1).sum() == 1 for cell in cells)
    np.testing.assert_allclose(found["share of cells seen once"], once / 64)
    np.testing.assert_allclose(found["length mean"], lengths.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["length sd"], lengths.std(), rtol=1e-3)
    np.testing.assert_allclose(
        found["top opening"], sum(e.opening == tiny_streams.TEMPLATE for e in events) / 64, atol=0.1
    )
    assert PROBES == 8


def test_a_member_is_described_by_its_scoring_half(tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 1, 60, attack_from=30)
    states, halves = _recorded(events)
    mine = [event for event, half in zip(events, halves, strict=True) if half == 1]
    found = dict(zip(GROUP_FEATURES, member_vector(states)[0], strict=True))
    np.testing.assert_allclose(
        found["probe mean"], np.clip([event.probes[0] for event in mine], -4, 4).mean(), rtol=1e-4
    )
    np.testing.assert_allclose(mean_sketch(states)[0], np.mean([event.sketch for event in mine], axis=0), atol=1e-5)


def test_repeated_sketches_are_near_duplicates(tiny_streams: Any) -> None:
    (event,) = tiny_streams.stream("a", 1, 1)
    assert _recorded([event] * 10)[0]["near_duplicates"][0] == 9
    assert _recorded(tiny_streams.stream("a", 1, 40))[0]["near_duplicates"][0] == 0


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


def test_known_lists_and_follow_ups_are_counted(tiny_streams: Any) -> None:
    events = [
        replace(event, known_list=index % 3 - 1, turn=index)
        for index, event in enumerate(tiny_streams.stream("a", 1, 9))
    ]
    states, _ = _recorded(events)
    assert states["list_hits"][0, :2].tolist() == [3, 3]
    assert states["follow_ups"][0] == 8

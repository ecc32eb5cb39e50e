"""What a request adds to the counters, and the features read off them, against plain numpy."""

from dataclasses import replace
from typing import Any

import numpy as np

from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.features import TOP, vector
from spider_sense.extraction.layout import EMPTY_LINK, LINK_KINDS, States
from spider_sense.extraction.profile import record
from spider_sense.extraction.state import fresh
from spider_sense.extraction.tiers import TieredDetector


def _recorded(events: Any, seed: int = 5) -> States:
    states = fresh([seed])
    for event in events:
        record(states, EventBatch.of([event]), salt=1)
    return states


def test_sums_are_of_what_was_seen(tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 1, 60, attack_from=30)
    blind = [replace(event, sketch=None, probes=None) for event in events[:20]]
    states = _recorded([*events, *blind])
    assert (states["count"][0], states["sketched"][0]) == (80, 60)
    probes = np.clip([event.probes[0] for event in events], -4, 4)
    np.testing.assert_allclose(states["probe"][0], probes.sum(), rtol=1e-5)


def test_features_are_what_their_names_say(detector: TieredDetector, tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 1, 64, attack_from=20)
    mean, top, opening = vector(detector.replay([events]).states, detector.population.centres)[0]
    probe = np.array([event.probes[0] for event in events])
    np.testing.assert_allclose(mean, np.clip(probe, -4, 4).mean(), rtol=1e-5)
    # Read off a histogram, whose last bin stands for what honest requests have there.
    highest = np.sort(np.minimum(probe, detector.population.centres[-1]))[-round(TOP * 64) :]
    assert abs(top - highest.mean()) < 0.3
    np.testing.assert_allclose(opening, sum(e.opening == tiny_streams.TEMPLATE for e in events) / 64, atol=0.1)


def test_link_evidence_is_kept_by_kind(tiny_streams: Any) -> None:
    links = [("payment", 77), ("prefix", 88), ("prefix", 66)]
    states = _recorded(tiny_streams.stream("a", 1, 40, links=links))
    kept = {kind: states["links"][0, index] for index, kind in enumerate(LINK_KINDS)}
    assert kept["payment"].tolist() == [77] + [int(EMPTY_LINK)] * 15
    assert kept["prefix"].tolist() == [66, 88] + [int(EMPTY_LINK)] * 14
    parameters = sorted({event.parameters for event in tiny_streams.stream("a", 1, 40)})
    assert kept["parameters"][: len(parameters)].tolist() == parameters


def test_known_lists_are_counted(tiny_streams: Any) -> None:
    events = [replace(event, known_list=index % 3 - 1) for index, event in enumerate(tiny_streams.stream("a", 1, 9))]
    states = _recorded(events)
    assert states["list_hits"][0, :2].tolist() == [3, 3]

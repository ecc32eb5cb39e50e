"""The sample of a principal's requests."""

from dataclasses import replace
from typing import Any

import numpy as np

from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.layout import SAMPLE, SKETCH
from spider_sense.extraction.sample import STEP, sample, sampled
from spider_sense.extraction.state import fresh
from spider_sense.extraction.tiers import TieredDetector


def test_the_first_requests_are_kept_in_steps(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    events = tiny_streams.stream("a", 1, SAMPLE - 2)
    blind = [replace(event, sketch=None, probes=None) for event in events[:5]]
    logits, sketches = sampled(uncalibrated.replay([[*blind, *events]]).states[0])
    np.testing.assert_array_equal(logits, [event.probes[0] for event in events])
    np.testing.assert_allclose(sketches * STEP, [event.sketch for event in events], atol=STEP / 2)


def test_a_coordinate_has_a_largest_step() -> None:
    batch = _batch(np.full((1, SKETCH), -1e6, dtype=np.float32), np.zeros((1, 8), dtype=np.float32))
    states = fresh([1])
    states["sketched"] = 1
    sample(states, batch)
    assert (states["sample"][0, 0] == -127).all()


def test_every_request_is_as_likely_to_be_kept() -> None:
    principals, life = 1500, 3 * SAMPLE
    states = fresh(list(range(principals)))
    for turn in range(life):
        states["sketched"] += 1
        numbers = np.full((principals, SKETCH), turn * STEP, dtype=np.float32)
        sample(states, _batch(numbers, np.full((principals, 8), turn, dtype=np.float32)))
    kept = np.bincount(states["sample_logits"].astype(int).ravel(), minlength=life) / principals
    assert kept.sum() == SAMPLE
    np.testing.assert_allclose(kept, 1 / 3, atol=0.06)  # five standard deviations
    # Logit and sketch are of the same request.
    np.testing.assert_array_equal(states["sample"][:, :, 0], states["sample_logits"])


def _batch(sketch: Any, probes: Any) -> EventBatch:
    count = len(sketch)
    zeros = np.zeros(count, dtype=np.int64)
    return EventBatch(
        time=zeros.astype(np.float64),
        sketch=sketch,
        probes=probes,
        tenant=np.zeros(count, dtype="S24"),
        opening=zeros.astype(np.uint64),
        parameters=zeros.astype(np.uint64),
        top_logprobs=zeros,
        max_tokens=zeros,
        choices=zeros + 1,
        known_list=zeros - 1,
        biased=((),) * count,
        links=((),) * count,
    )

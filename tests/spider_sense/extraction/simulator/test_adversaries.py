"""What attackers who adapt make of a list, and sweeps of the output matrix."""

import numpy as np
import pytest

from spider_sense.errors import ConfigError
from spider_sense.extraction.simulator.adversaries import batched, matched, paraphrased, partitioned, unsuspicious
from spider_sense.extraction.simulator.families import Family
from spider_sense.extraction.simulator.sweeps import classifier, sweep


def test_paraphrasing_uses_every_wrapper_and_loses_nothing() -> None:
    campaign = Family(
        name="c", kind="campaign", texts=tuple(f"task {n}." for n in range(60)), wrappers=("A {payload}", "{payload} B")
    )
    made = paraphrased(campaign, 0)
    assert made == paraphrased(campaign, 0)
    assert all(text in whole for text, whole in zip(campaign.texts, made, strict=True))
    assert any(whole.endswith(" B") for whole in made)
    assert len({whole.split("task")[0] for whole in made}) > 5


def test_matching_keeps_the_nearest() -> None:
    sketch_NS = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [-1.0, 0.0]])
    assert matched(["a", "b", "c", "d"], sketch_NS, np.array([[2.0, 0.0]]), 0.5) == ("a", "c")
    with pytest.raises(ConfigError, match="keep=0"):
        matched(["a"], sketch_NS[:1], sketch_NS, 0)


def test_an_oracle_leaves_what_it_scores_low() -> None:
    assert unsuspicious(["a", "b", "c"], np.array([0.1, 3.0, -1.0]), 1.0) == ("a", "c")


def test_parts_are_topics_and_lose_nothing() -> None:
    sketch_NS = np.repeat(np.eye(3), 5, axis=0)
    texts = [f"{place}" for place in range(15)]
    parts = partitioned(texts, sketch_NS, 3, 0)
    assert sorted(text for part in parts for text in part) == sorted(texts)
    assert all(len({int(text) // 5 for text in part}) == 1 for part in parts)
    with pytest.raises(ConfigError, match="16 parts of 15"):
        partitioned(texts, sketch_NS, 16, 0)


def test_batching_numbers_its_questions() -> None:
    assert batched(["a", "b", "c", "d", "e"], 2) == ("1. a\n2. b", "1. c\n2. d")
    with pytest.raises(ConfigError, match="3 questions"):
        batched(["a"], 3)


def test_a_sweep_biases_every_token_once_a_pass() -> None:
    stream = sweep("s", vocabulary=100, requests=30, seed=0, biased=10, prompts=("a", "b"))
    for first in (0, 10, 20):
        tokens = [token for request in stream.requests[first : first + 10] for token in request.biased]
        assert sorted(tokens) == list(range(100))
    assert [request.text for request in stream.requests[::10]] == ["a", "b", "a"]


def test_a_classifier_biases_its_labels_alone() -> None:
    stream = classifier("c", ["x", "y"], 100, 50, 0, labels=4)
    assert len({request.biased for request in stream.requests}) == 1
    assert len(set(stream.requests[0].biased)) == 4

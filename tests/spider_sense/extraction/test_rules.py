"""Rules: logit sweeps, known lists, activations that nobody saw."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spider_sense.extraction import Decision, Event
from spider_sense.extraction.rules import Rules
from spider_sense.extraction.ruling import judge
from spider_sense.extraction.standing import strictest
from spider_sense.extraction.tiers import TieredDetector

VOCABULARY, WIDTH = 49_152, 576


def _first(detector: TieredDetector, events: list[Event]) -> int | None:
    """Return after how many requests the rules act."""
    acts = detector.replay([events]).rule_NT[0] >= 3
    return int(acts.argmax()) + 1 if acts.any() else None


@pytest.mark.parametrize("max_tokens", [1, 4, 200, 0])
def test_a_sweep_is_found_long_before_a_quarter_of_the_rank(
    uncalibrated: TieredDetector, tiny_streams: Any, max_tokens: int
) -> None:
    ids = [[(20 * turn + i) % VOCABULARY for i in range(20)] for turn in range(300)]
    found = _first(uncalibrated, tiny_streams.biased("sweep", ids, max_tokens))
    assert found is not None
    # A column of the output matrix takes the whole vocabulary; a quarter of the rank takes width / 4 of them.
    assert found < WIDTH / 4 * VOCABULARY / 20
    assert found <= (60 if max_tokens in (1, 4) else 230)


def test_a_narrow_sweep_is_found_by_its_rank(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    # 150 tokens, ten at a time with long answers: few distinct ids, but a matrix of prompts by ids fills up.
    ids = [[(10 * turn + i) % 150 for i in range(10)] for turn in range(2200)]
    found = _first(uncalibrated, tiny_streams.biased("narrow", ids, max_tokens=100))
    assert found is not None
    assert found * 10 / 150 < WIDTH / 4


@pytest.mark.parametrize(("max_tokens", "within"), [(1, 260), (4, 70), (100, 10), (0, 10)])
@pytest.mark.parametrize("biased", [20, 300])
def test_a_sweep_of_fewer_ids_than_are_many_is_found_by_its_rank(
    uncalibrated: TieredDetector, tiny_streams: Any, biased: int, max_tokens: int, within: int
) -> None:
    # An eighth of the rank takes that many logits squared, 20 of which each token of an answer shows.
    ids = [[(biased * turn + i) % 900 for i in range(biased)] for turn in range(300)]
    found = _first(uncalibrated, tiny_streams.biased("sweep", ids, max_tokens))
    assert found is not None
    assert found <= within


def test_single_ids_take_a_request_each(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    events = tiny_streams.biased("single", [[turn % 900] for turn in range(1400)], max_tokens=4)
    found = _first(uncalibrated, events)
    assert found is not None
    assert (WIDTH / 8) ** 2 / 4 <= found <= 1300


def test_touching_many_ids_once_hides_no_sweep_of_few(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    touched = [[100 + 20 * turn + i for i in range(20)] for turn in range(40)]
    read = [[(20 * turn + i) % 100 for i in range(20)] for turn in range(360)]
    found = _first(uncalibrated, tiny_streams.biased("padded", [*touched, *read]))
    # 72 prompts by 100 ids would be read at the end.
    assert found is not None
    assert found <= 260


@pytest.mark.parametrize("max_tokens", [1, 200, 0])
@pytest.mark.parametrize("labels", [2, 20, 77, 150])
def test_a_fixed_set_of_labels_is_no_sweep(
    uncalibrated: TieredDetector, tiny_streams: Any, labels: int, max_tokens: int
) -> None:
    events = tiny_streams.biased("labels", [list(range(labels))] * 1024, max_tokens)
    levels = uncalibrated.replay([events]).rule_NT
    assert not levels.any(), "it is not even watched"


@pytest.mark.parametrize(("max_tokens", "acted_on"), [(1, 1037), (0, 5)])
def test_sets_that_take_turns_are_a_sweep_of_a_narrow_model_alone(
    uncalibrated: TieredDetector, tiny_streams: Any, max_tokens: int, acted_on: int
) -> None:
    ids = [[20 * (turn % 4) + i for i in range(20)] for turn in range(1100)]
    events = [replace(one, top_logprobs=5) for one in tiny_streams.biased("sets", ids, max_tokens)]
    assert _first(uncalibrated, events) == acted_on
    state = uncalibrated.open("sets")
    for event in events:
        state, _ = uncalibrated.update(state, event)
    assert Rules(2048).judge(state.states) == 0


def test_long_limits_count_as_what_answers_usually_take(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    state = uncalibrated.open("long")
    for event in tiny_streams.biased("long", [[1, 2], [3, 4]], max_tokens=100_000):
        state, _ = uncalibrated.update(state, event)
    assert state.states["revealed"] == 2 * 2 * 256


def test_every_choice_shows_logits_of_its_own(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    """So that whoever asks for many choices at once needs no fewer logits than whoever asks again."""
    ids = [list(range(20 * turn, 20 * turn + 20)) for turn in range(200)]
    one, many = (
        [replace(event, choices=choices) for event in tiny_streams.biased("sweep", ids, max_tokens=1)]
        for choices in (1, 8)
    )
    many_at, one_at = _first(uncalibrated, many), _first(uncalibrated, one)
    assert many_at is not None
    assert one_at is not None
    assert many_at < one_at
    state = uncalibrated.open("sweep")
    for event in many[:3]:
        state, _ = uncalibrated.update(state, event)
    assert state.states["revealed"] == 3 * 20 * 8
    assert state.states["biased_requests"] == state.count == 3


def test_evidence_names_the_numbers(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    ids = [[20 * turn + i for i in range(20)] for turn in range(80)]
    state = uncalibrated.open("sweep")
    decisions: list[Decision] = []
    for event in tiny_streams.biased("sweep", ids):
        state, new = uncalibrated.update(state, event)
        decisions += new
    rules = [decision for decision in decisions if decision.tier == "rule"]
    assert [decision.level for decision in rules] == ["watch", "act"]
    assert "biased, named or allowed about" in rules[-1].evidence[0]
    assert f"of {WIDTH}" in rules[-1].evidence[0]


def test_list_hits_and_unseen_activations_are_watched(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    plain = tiny_streams.stream("a", 1, 40)
    hits = [replace(event, known_list=2) for event in plain]
    blind = [replace(event, sketch=None, probes=None) for event in plain]
    levels = uncalibrated.replay([plain, hits, blind]).rule_NT
    assert levels[:, -1].tolist() == [0, 1, 1]
    assert np.nanmax(levels[:, :15]) == 0


def test_what_a_rule_found_hides_no_sweep(uncalibrated: TieredDetector, tiny_streams: Any) -> None:
    """Both are watched: activations that nobody saw from request 16 on, then a sweep of 600 ids."""
    ids = [[(4 * turn + i) % 600 for i in range(4)] for turn in range(150)]
    blind = [replace(one, sketch=None, probes=None) for one in tiny_streams.biased("blind", ids, max_tokens=1)]
    ruling = judge(uncalibrated, {"blind": blind})
    (found,) = ruling.highest()["blind"]
    assert found.level == "watch"
    assert "biased, named or allowed about" in found.evidence[0]
    assert "activations of 0 of" in found.evidence[1]
    assert strictest(ruling.decisions) == found
    # Each is told once.
    assert [one.count for one in ruling.decisions] == [16, found.count]

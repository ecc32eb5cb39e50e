"""Figures out of rows, and differences between runs."""

import math
from copy import deepcopy
from typing import Any

import pytest

from nest.figures import differences, figures_of
from spider_sense.errors import DataError


@pytest.fixture
def rows() -> dict[str, Any]:
    names = [f"{file}/{number}" for file in ("one", "two") for number in range(5)]
    refused = [True, True, True, False, False, True, False, False, False, False]
    judged = {"ids": names, "refused": refused, "refused_classifier": [True] * 10, "seconds": 1.5}
    task = {"ids": ["a", "b"], "correct": [True, False], "correct_normalised": [True, True], "seconds": 1.0}
    return {
        "harmful": judged,
        "benign": {**judged, "refused_classifier": None},
        "attack/prefill": {**judged, "details": {"neurons": 3}},
        "task/util_piqa": {**task, "normalised": True, "outcomes": [True, True]},
        "task/util_copa": {**task, "normalised": False, "outcomes": [True, False]},
        "perplexity": {"ids": ["x", "y"], "nats": [2.0, 30.0], "tokens": [2, 10], "seconds": 0.5},
        "kl": {"ids": ["x"], "nats": [0.5], "tokens": [10], "seconds": 0.25},
    }


def test_rates_count_answers_for_attacks_and_refusals_for_benign_prompts(rows: dict[str, Any]) -> None:
    figures = figures_of(rows, 0, 200)
    assert figures["asr"]["value"] == pytest.approx(0.6)
    assert figures["over_refusal"]["value"] == pytest.approx(0.4)
    assert figures["asr_classifier"]["value"] == 0
    assert figures["over_refusal_classifier"] is None
    assert figures["asr_jailbreak"] is None
    assert figures["attacks"]["prefill"]["asr"]["value"] == pytest.approx(0.6)
    assert figures["attacks"]["prefill"]["neurons"] == 3
    assert figures["sources"]["harmful"]["one"]["value"] == pytest.approx(0.4)
    assert figures["sources"]["harmful"]["two"]["value"] == pytest.approx(0.8)


def test_utility_is_the_mean_of_the_tasks_figures(rows: dict[str, Any]) -> None:
    figures = figures_of(rows, 0, 200)
    assert figures["utility"]["value"] == pytest.approx(0.75)
    assert figures["tasks"]["util_piqa"]["figure"] == "accuracy_normalised"
    assert figures["tasks"]["util_copa"]["accuracy"]["value"] == pytest.approx(0.5)
    assert figures["perplexity"]["value"] == pytest.approx(math.exp(32 / 12))
    assert figures["kl"]["value"] == pytest.approx(0.05)
    assert figures["seconds"] == pytest.approx(7.25)


def test_nothing_measured_is_none() -> None:
    figures = figures_of({}, 0, 200)
    assert [figures[name] for name in ("asr", "utility", "perplexity", "kl")] == [None] * 4
    assert figures["attacks"] == figures["tasks"] == {}


def test_differences_are_paired(rows: dict[str, Any]) -> None:
    ours = deepcopy(rows)
    ours["harmful"]["refused"] = [True] * 6 + [False] * 4
    ours["perplexity"]["nats"] = [2.0 + 2 * 0.1, 30.0 + 10 * 0.1]
    ours["task/util_copa"]["outcomes"] = [True, True]
    found = differences(ours, rows)
    assert found["asr"]["value"] == pytest.approx(-0.2)
    assert found["asr"]["high"] <= 0
    assert found["over_refusal"]["value"] == 0
    assert found["utility"]["value"] == pytest.approx(0.25)
    # Every document lost the same, so there is nothing to be uncertain about.
    relative = math.exp(0.1) - 1
    assert found["perplexity"] == pytest.approx({"value": relative, "low": relative, "high": relative, "n": 2})


def test_other_prompts_are_not_compared(rows: dict[str, Any]) -> None:
    ours = deepcopy(rows)
    ours["benign"]["ids"] = ["one/99", *rows["benign"]["ids"][1:]]
    with pytest.raises(DataError, match="benign was measured on other prompts"):
        differences(ours, rows)


def test_where_the_base_answered_nothing_there_is_no_divergence(rows: dict[str, Any]) -> None:
    rows["kl"] = {"ids": [], "nats": [], "tokens": [], "seconds": 0.25}
    assert figures_of(rows, seed=0, resamples=10)["kl"] is None

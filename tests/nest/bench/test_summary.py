"""One row an arm: means over runs, intervals over prompts, differences prompt by prompt."""

from math import exp
from typing import Any

import pytest

from nest.bench.summary import summarise, summarise_all


def result(refused: list[bool], nats: float = 2.0) -> dict[str, Any]:
    """Return what is read of a result with a rate, a task, two documents and an attack."""
    ids = [str(place) for place in range(len(refused))]
    rate = {"ids": ids, "refused": refused, "refused_classifier": None, "seconds": 1.0}
    task = {"ids": ["a", "b"], "correct": [True, False], "correct_normalised": [True, True], "normalised": False}
    return {
        "rows": {
            "harmful": rate,
            "task/copa": {**task, "outcomes": [1.0, 0.0], "seconds": 0.5},
            "perplexity": {"ids": ["d", "e"], "nats": [nats, nats], "tokens": [1, 1], "seconds": 0.5},
            "attack/prefill": {**rate, "refused": [False] * len(refused)},
        },
        "asr": {"value": 1 - sum(refused) / len(refused)},
        "utility": {"value": 0.5},
        "perplexity": {"value": exp(nats)},
        "seconds": 2.0,
        "trained_share": 0.001,
    }


def test_a_prompts_outcome_is_averaged_before_prompts_are_resampled() -> None:
    summary = summarise([result([True] * 4 + [False] * 4), result([False] * 4 + [True] * 4)])
    # Every prompt succeeds in half of the runs, so resampling prompts changes nothing.
    assert summary["asr"] == 0.5
    assert summary["intervals"]["asr"] == pytest.approx([0.5, 0.5])
    assert summary["sd"]["asr"] == 0.0
    assert summary["runs"] == 2
    assert "asr_classifier" not in summary
    alone = summarise([result([True] * 4 + [False] * 4)])
    low, high = alone["intervals"]["asr"]
    assert low < 0.5 < high
    assert alone["sd"]["asr"] is None


def test_other_figures_are_means_over_runs_with_their_own_intervals() -> None:
    summary = summarise([result([True], 2.0), result([True], 3.0)])
    assert summary["perplexity"] == pytest.approx(exp(2.5))
    assert summary["intervals"]["perplexity"] == pytest.approx([exp(2.5)] * 2)
    assert summary["sd"]["perplexity"] > 0
    low, high = summary["intervals"]["utility"]
    assert low <= summary["utility"] == 0.5 <= high
    assert summary["attacks"]["prefill"]["value"] == 1.0
    assert (summary["seconds"], summary["trained_share"]) == (2.0, 0.001)
    assert summary["kl"] is None


def test_arms_are_compared_prompt_by_prompt() -> None:
    runs = {
        "base": result([False] * 4, 2.0),
        "nest-seed0-draw0": result([True, True, False, False], 2.1),
        "nest-seed1-draw1": result([True, True, True, False], 2.1),
        "random_rows-seed0-draw0": result([True, False, False, False], 2.3),
    }
    arms = summarise_all(runs)
    assert {arm: one["runs"] for arm, one in arms.items()} == {"base": 1, "nest": 2, "random_rows": 1}
    assert "versus_base" not in arms["base"]
    assert "versus_nest" not in arms["nest"]
    gain = arms["nest"]["versus_base"]
    assert gain["asr"]["value"] == pytest.approx(-0.625)
    assert gain["asr"]["low"] <= -0.625 <= gain["asr"]["high"] <= 0
    assert gain["perplexity"]["value"] == pytest.approx(exp(0.1) - 1)
    assert arms["random_rows"]["versus_nest"]["asr"]["value"] == pytest.approx(0.375)
    assert arms["random_rows"]["versus_nest"]["utility"]["value"] == 0.0

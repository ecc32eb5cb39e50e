"""One row an arm: means over runs, intervals over prompts."""

from typing import Any

import pytest

from nest.bench.summary import summarise, summarise_all


def result(refused: list[bool], perplexity: float = 10.0) -> dict[str, Any]:
    """Return what is read of a result with one part."""
    rate = {"value": 1 - sum(refused) / len(refused), "low": 0.0, "high": 1.0, "n": len(refused)}
    figure = {"value": perplexity, "low": perplexity - 1, "high": perplexity + 1, "n": 5}
    return {
        "rows": {"harmful": {"refused": refused, "refused_classifier": None}},
        "asr": rate,
        "utility": None,
        "perplexity": figure,
        "kl": None,
        "seconds": 2.0,
        "attacks": {"prefill": {"asr": {"value": 0.5}}},
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


def test_other_figures_are_averaged() -> None:
    summary = summarise([result([True], 10.0), result([True], 14.0)])
    assert summary["perplexity"] == 12.0
    assert summary["intervals"]["perplexity"] == [11.0, 13.0]
    assert summary["attacks"] == {"prefill": 0.5}
    assert (summary["seconds"], summary["trained_share"]) == (2.0, 0.001)
    assert summary["utility"] is None


def test_runs_are_put_together_by_arm() -> None:
    runs = {"base": result([False]), "nest-seed0-draw0": result([True]), "nest-seed1-draw1": result([True])}
    arms = summarise_all(runs)
    assert {arm: one["runs"] for arm, one in arms.items()} == {"base": 1, "nest": 2}

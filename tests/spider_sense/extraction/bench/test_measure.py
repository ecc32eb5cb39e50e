"""Thresholds over principals, medians with misses."""

import numpy as np
import pytest

from spider_sense.extraction.bench.measure import (
    conformal_threshold,
    median_queries,
    thresholds_by_stratum,
)
from spider_sense.extraction.bench.outcome import Outcome
from spider_sense.intervals import grouped_interval


def test_the_threshold_holds_its_rate() -> None:
    generator = np.random.default_rng(0)
    exceeded = [
        generator.standard_normal() > conformal_threshold(generator.standard_normal(99), 0.05) for _ in range(4000)
    ]
    assert np.mean(exceeded) == pytest.approx(0.05, abs=0.012)


def test_too_few_principals_give_no_threshold() -> None:
    assert conformal_threshold(np.arange(98, dtype=np.float64), 0.01) == np.inf
    assert conformal_threshold(np.arange(99, dtype=np.float64), 0.01) == 98.0


def test_a_small_stratum_borrows() -> None:
    scores = np.concatenate([np.zeros(99), np.ones(5)])
    found = thresholds_by_stratum(scores, ["large"] * 99 + ["small"] * 5, 0.01)
    assert set(found) == {"", "large"}
    assert found["large"] == 0.0


def test_the_median_counts_misses_as_infinite() -> None:
    assert median_queries([3, 5, np.inf]) == 5
    assert median_queries([3, 5, np.inf, np.inf]) == np.inf
    assert median_queries([]) == np.inf


def test_an_alarm_before_the_campaign_is_a_miss() -> None:
    about = {"seed": 0, "system": "s", "embedding": "hidden", "scene": "x", "stratum": "chat", "family": "f"}
    assert Outcome(**about, length=100, alarm=70, begin=60).queries == 10  # type: ignore[arg-type]
    assert Outcome(**about, length=100, alarm=60, begin=60).queries == np.inf  # type: ignore[arg-type]
    assert Outcome(**about, length=100, alarm=None).queries == np.inf  # type: ignore[arg-type]


def test_a_median_of_misses_has_an_infinite_interval() -> None:
    interval = grouped_interval([1.0, np.inf, np.inf, np.inf], ["a", "b", "c", "d"], median_queries, 200)
    assert interval.high == np.inf

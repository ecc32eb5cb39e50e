"""Each baseline says more of what it looks for, and its numbers are those of its formula."""

import numpy as np
import pytest

from spider_sense.extraction.bench.baselines import (
    Adwin,
    Background,
    Coverage,
    Mahalanobis,
    Mmd,
    NearDuplicates,
    PageHinkley,
    Prada,
    RateLimit,
    Trace,
)
from spider_sense.extraction.bench.baselines.level import kernel, median_distance
from spider_sense.extraction.bench.windows import Discrepancy, Windows, mmd_rates, score_rates

WIDTH, TEXTS, ODD = 8, 300, 60


def _unit(rows: np.ndarray) -> np.ndarray:
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    """Texts that are alike, and after them odd ones."""
    generator = np.random.default_rng(0)
    usual = generator.standard_normal((TEXTS, WIDTH)) + np.eye(WIDTH)[0] * 2
    odd = 0.3 * generator.standard_normal((ODD, WIDTH)) - np.eye(WIDTH)[1] * 2
    return _unit(np.concatenate([usual, odd]))


def _trace(table: np.ndarray, rows: np.ndarray, gap: float = 60.0) -> Trace:
    return Trace(table[rows], np.arange(len(rows), dtype=np.float64) * gap, rows)


@pytest.fixture(scope="module")
def background(table: np.ndarray) -> Background:
    generator = np.random.default_rng(1)
    traces = [_trace(table, generator.integers(TEXTS, size=64)) for _ in range(40)]
    return Background(table, np.concatenate([trace.rows for trace in traces]), traces)


def test_a_rate_counts_the_last_hour(table: np.ndarray) -> None:
    curve = RateLimit().curve(_trace(table, np.arange(100), gap=60.0))
    assert curve[0] == 1
    assert curve[-1] == 61


def test_near_duplicates_count_repeats(table: np.ndarray) -> None:
    curve = NearDuplicates(0.999).curve(_trace(table, np.array([0, 1, 0, 2, 1])))
    assert curve.tolist() == [0, 0, 1, 1, 2]


def test_prada_sees_distances_that_are_not_normal(table: np.ndarray) -> None:
    generator = np.random.default_rng(2)
    natural = Prada().curve(_trace(table, generator.permutation(TEXTS)[:100]))
    # Half of the requests are a hair's breadth beside an earlier one, as synthetic queries are.
    made = np.repeat(table[:50], 2, axis=0) + np.tile([[0.0], [0.02]], (50, 1)) * generator.standard_normal(
        (100, WIDTH)
    )
    attack = Prada().curve(Trace(_unit(made), np.arange(100, dtype=np.float64), np.arange(100)))
    assert natural[19] == -np.inf
    assert attack[-1] > 2 * natural[-1]


@pytest.mark.parametrize("method", [Mahalanobis, Coverage, Mmd])
def test_levels_rise_on_odd_requests(method: type[Mmd], table: np.ndarray, background: Background) -> None:
    generator = np.random.default_rng(3)
    baseline = method(background)
    usual = baseline.curve(_trace(table, generator.integers(TEXTS, size=64)))
    odd = baseline.curve(_trace(table, TEXTS + generator.integers(ODD, size=64)))
    assert usual[14] == -np.inf
    assert odd[-1] > 3 + usual[-1]


@pytest.mark.parametrize("method", [Adwin, PageHinkley])
def test_drift_is_found_after_it_happened(method: type[Adwin], table: np.ndarray, background: Background) -> None:
    pytest.importorskip("river", reason="river is not installed; the extra extraction-bench has it")
    generator = np.random.default_rng(4)
    before, after = generator.integers(TEXTS, size=100), TEXTS + generator.integers(ODD, size=100)
    baseline = method(background)
    changed = baseline.curve(_trace(table, np.concatenate([before, after])))
    same = baseline.curve(_trace(table, np.concatenate([before, generator.integers(TEXTS, size=100)])))
    assert changed[-1] > changed[99]
    assert changed[-1] > same[-1]


def test_the_discrepancy_is_the_unbiased_estimate(table: np.ndarray) -> None:
    median = median_distance(table[:50])
    one, other = np.array([0, 1, 2, 2]), np.array([5, 6, 7])

    def naive(a: np.ndarray, b: np.ndarray) -> float:
        def k(x: int, y: int) -> float:
            return float(kernel(table[[x]] @ table[[y]].T, median)[0, 0])

        own_a = np.mean([k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j])
        own_b = np.mean([k(b[i], b[j]) for i in range(len(b)) for j in range(len(b)) if i != j])
        return float(own_a + own_b - 2 * np.mean([k(i, j) for i in a for j in b]))

    found = Discrepancy(table, median).between([one], [other])
    assert found[0, 0] == pytest.approx(naive(one, other), abs=1e-9)


def test_windows_catch_campaigns_and_people_alike() -> None:
    generator = np.random.default_rng(5)
    table = _unit(
        np.concatenate([generator.standard_normal((1500, WIDTH)), generator.standard_normal((60, WIDTH)) + 3])
    )
    odd = np.arange(1500, 1560)
    windows = Windows.draw(np.arange(1500), {"odd": odd}, [odd[:30]], window=50, seed=0)
    score = score_rates(lambda some: np.array([np.mean(rows >= 1500) for rows in some]), windows)
    for found in (mmd_rates(table, windows), score):
        assert found["1"] == found["0.5"] == 1.0
        assert found["people"] == 1.0
        assert found["benign"] is not None
        assert found["benign"] < 0.1
    assert mmd_rates(table, windows)["0.05"] != 1.0
    nobody = Windows.draw(np.arange(1500), {"odd": odd}, [], window=50, seed=0)
    assert mmd_rates(table, nobody)["people"] is None

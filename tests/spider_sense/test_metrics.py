import json
import sys
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spider_sense.errors import ConfigError, DataError, MissingExtraError
from spider_sense.metrics import (
    Interval,
    auroc,
    auroc_interval,
    clopper_pearson,
    log_auroc,
    most_within,
    paired_bootstrap_tpr_difference,
    rate_above,
    roc_points,
    summary,
    tpr_at_fpr,
    tpr_interval,
)

Rows = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]

HALF_STEPS = st.integers(-6, 6).map(lambda steps: steps / 2)
ODD_SCORES = HALF_STEPS | st.sampled_from([np.nan, np.inf, -np.inf])


def rows_of(positives: list[float], negatives: list[float]) -> Rows:
    labels = np.arange(len(positives) + len(negatives)) < len(positives)
    return np.array(positives + negatives, dtype=np.float64), labels


def gaussian(shift: float, n: int = 400, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    return rows_of(generator.normal(shift, 1, n).tolist(), generator.normal(0, 1, n).tolist())


@given(st.lists(ODD_SCORES, min_size=1, max_size=12), st.lists(ODD_SCORES, min_size=1, max_size=12))
def test_auroc_is_the_share_of_pairs_won(positives: list[float], negatives: list[float]) -> None:
    def flagged_first(score: float) -> float:
        return np.inf if np.isnan(score) else score

    won = [
        0.5 if flagged_first(p) == flagged_first(n) else float(flagged_first(p) > flagged_first(n))
        for p in positives
        for n in negatives
    ]
    assert auroc(*rows_of(positives, negatives)) == pytest.approx(np.mean(won))


@given(st.lists(ODD_SCORES, min_size=1, max_size=12), st.lists(ODD_SCORES, min_size=1, max_size=12))
def test_auroc_is_the_trapezoid_under_roc_points(positives: list[float], negatives: list[float]) -> None:
    fpr, tpr = roc_points(*rows_of(positives, negatives))
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert auroc(*rows_of(positives, negatives)) == pytest.approx(np.trapezoid(tpr, fpr))


def test_one_class_has_no_area_and_no_curve() -> None:
    for labels in (np.ones(3, dtype=bool), np.zeros(3, dtype=bool)):
        assert auroc(np.arange(3.0), labels) is None
        assert log_auroc(np.arange(3.0), labels) is None
        with pytest.raises(DataError, match="both classes"):
            roc_points(np.arange(3.0), labels)


def test_log_auroc_of_a_perfect_a_useless_and_a_constant_score() -> None:
    assert log_auroc(*rows_of([2.0] * 5, [1.0] * 5)) == pytest.approx(1)
    assert log_auroc(*rows_of([1.0] * 5, [2.0] * 5)) == 0
    assert log_auroc(*rows_of([1.0] * 5, [1.0] * 5)) == 0


def test_log_auroc_is_a_step_function_on_the_log_axis() -> None:
    # One positive above all 100 negatives, the other above all but one: 0.5 up to FPR 1e-2, then 1.
    scores, labels = rows_of([200.0, 98.5], [float(value) for value in range(100)])
    assert log_auroc(scores, labels) == pytest.approx(0.75)


def test_log_auroc_of_chance() -> None:
    scores = np.random.default_rng(0).random(40_000)
    labels = np.arange(40_000) % 2 == 0
    assert log_auroc(scores, labels) == pytest.approx((0.1 - 0.001) / np.log(100), abs=0.004)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (0.1, 0.1), (0.1, 1.5)])
def test_log_auroc_refuses_an_impossible_range(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match=f"low={low}"):
        log_auroc(*gaussian(1), low=low, high=high)


def test_clopper_pearson_against_published_values() -> None:
    # Zero of n: the upper end solves (1 - p)^n = 0.025.
    none, every = clopper_pearson(0, 299), clopper_pearson(10, 10)
    assert [none.low, none.high] == pytest.approx([0, 1 - 0.025 ** (1 / 299)])
    assert [every.low, every.high] == pytest.approx([0.025 ** (1 / 10), 1])
    # Newcombe, Statistics in Medicine 17 (1998), table I.
    interval = clopper_pearson(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2527, 0.3676)
    assert clopper_pearson(0, 0) == Interval(low=0.0, high=1.0)


@given(st.integers(1, 200), st.data())
def test_clopper_pearson_holds_the_share_and_widens_with_confidence(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    narrow, wide = clopper_pearson(successes, trials, 0.9), clopper_pearson(successes, trials, 0.99)
    assert 0 <= wide.low <= narrow.low <= successes / trials <= narrow.high <= wide.high <= 1


@pytest.mark.parametrize(("successes", "trials", "confidence"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_clopper_pearson_refuses_what_is_no_proportion(successes: int, trials: int, confidence: float) -> None:
    with pytest.raises(ConfigError):
        clopper_pearson(successes, trials, confidence)


def test_missing_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(MissingExtraError, match=r"'\.\[train\]"):
        clopper_pearson(1, 2)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 3000))
def test_most_within_is_the_largest_share_allowed(rate: float, n: int) -> None:
    count = most_within(rate, n)
    assert count / n <= rate < (count + 1) / n
    assert count < n


def test_most_within_survives_rounding() -> None:
    assert 0.29 * 100 < 29
    assert most_within(0.29, 100) == 29


def test_tpr_at_fpr_flags_exactly_the_share_allowed() -> None:
    point = tpr_at_fpr(*rows_of([99.5, 98.5, 10.0, 9.0], [float(value) for value in range(100)]), fpr=0.01)
    assert point.threshold == np.nextafter(98.0, np.inf)
    assert (point.tpr.value, point.tpr.n) == (0.5, 4)
    assert point.achieved_fpr.value == 0.01


def test_tpr_at_fpr_drops_a_tie_rather_than_exceed() -> None:
    point = tpr_at_fpr(*rows_of([5.0, 6.0], [5.0] * 3 + [0.0] * 97), fpr=0.02)
    assert point.achieved_fpr.value == 0
    assert point.tpr.value == 0.5


@given(
    st.lists(ODD_SCORES, min_size=1, max_size=12),
    st.lists(ODD_SCORES, min_size=1, max_size=12),
    st.floats(0, 1, exclude_max=True),
)
def test_tpr_at_fpr_is_the_step_of_the_roc(positives: list[float], negatives: list[float], fpr: float) -> None:
    rows = rows_of(positives, negatives)
    point, (rates, caught) = tpr_at_fpr(*rows, fpr=fpr), roc_points(*rows)
    assert point.tpr.value == caught[rates <= fpr].max()
    achieved = point.achieved_fpr.value
    assert achieved is not None
    assert achieved <= fpr or point.threshold == np.inf


def test_scores_that_are_not_numbers_are_flagged_and_earn_nothing() -> None:
    point = tpr_at_fpr(*rows_of([np.nan] * 4, [np.nan] * 10 + [0.0] * 90), fpr=0.01)
    assert (point.threshold, point.tpr.value, point.achieved_fpr.value) == (np.inf, 0, 0.1)
    assert rate_above(np.array([np.nan, np.inf, 1.0, 0.0]), 1.0).value == 0.75
    assert rate_above(np.arange(3.0), np.nan).value == 1


def test_tpr_at_fpr_without_a_class() -> None:
    no_negatives = tpr_at_fpr(np.arange(3.0), np.ones(3, dtype=bool), 0.01)
    assert (no_negatives.threshold, no_negatives.tpr.value, no_negatives.achieved_fpr.value) == (np.inf, None, None)
    no_positives = tpr_at_fpr(np.arange(3.0), np.zeros(3, dtype=bool), 0.01)
    assert (no_positives.tpr.value, no_positives.achieved_fpr.value) == (None, 0)


@pytest.mark.parametrize("fpr", [-0.1, 1.0, float("nan")])
def test_tpr_at_fpr_refuses_an_impossible_rate(fpr: float) -> None:
    with pytest.raises(ConfigError, match=f"rate {fpr}"):
        tpr_at_fpr(*gaussian(1), fpr=fpr)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(3,\) and labels \(2,\)"):
        auroc(np.arange(3.0), np.ones(2, dtype=bool))


def test_paired_bootstrap_sees_the_better_system_and_its_own_twin() -> None:
    strong, labels = gaussian(3)
    weak, _ = gaussian(1, seed=1)
    difference = paired_bootstrap_tpr_difference(strong, weak, labels, 0.05, resamples=200)
    assert difference is not None
    assert 0.3 < difference.low < difference.mean < difference.high < 0.9
    twin = paired_bootstrap_tpr_difference(strong, strong, labels, 0.05, resamples=50)
    assert twin is not None
    assert (twin.low, twin.mean, twin.high) == (0, 0, 0)


def test_paired_bootstrap_is_narrower_than_an_unpaired_one() -> None:
    scores, labels = gaussian(2)
    rival = scores + np.random.default_rng(2).normal(0, 0.05, scores.size)
    elsewhere, _ = gaussian(2, seed=3)
    paired = paired_bootstrap_tpr_difference(scores, rival, labels, 0.05, resamples=200)
    unpaired = paired_bootstrap_tpr_difference(scores, elsewhere, labels, 0.05, resamples=200)
    assert paired is not None
    assert unpaired is not None
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)


def test_paired_bootstrap_gives_the_mean_and_the_95_percent_interval() -> None:
    scores, labels = gaussian(1)
    rival, _ = gaussian(1, seed=1)
    one, two = (paired_bootstrap_tpr_difference(scores, rival, labels, 0.05, resamples=count) for count in (1, 2))
    assert one is not None
    assert two is not None
    first, second = one.mean, 2 * two.mean - one.mean
    step = abs(second - first)
    assert step > 0
    assert [two.low, two.high] == pytest.approx([min(first, second) + 0.025 * step, max(first, second) - 0.025 * step])


def test_paired_bootstrap_repeats_with_its_seed_and_needs_both_classes() -> None:
    scores, labels = gaussian(1)
    rival, _ = gaussian(1, seed=1)

    def run(seed: int) -> Any:
        return paired_bootstrap_tpr_difference(scores, rival, labels, 0.05, resamples=20, seed=seed)

    assert run(7) == run(7) != run(8)
    assert paired_bootstrap_tpr_difference(scores, rival, np.ones_like(labels), 0.05) is None
    with pytest.raises(ConfigError, match="resamples=0"):
        paired_bootstrap_tpr_difference(scores, rival, labels, 0.05, resamples=0)


def test_summary_is_json_and_none_where_a_class_is_missing() -> None:
    scores, labels = gaussian(3)
    full = json.loads(json.dumps(summary(scores.astype(np.float32), labels), allow_nan=False))
    assert (full["n"], full["positives"]) == (800, 400)
    assert full["auroc"] == pytest.approx(0.983, abs=0.01)
    for key, fpr in (("tpr_at_1pct_fpr", 0.01), ("tpr_at_0_1pct_fpr", 0.001)):
        assert full[key]["value"] == tpr_at_fpr(scores.astype(np.float32), labels, fpr).tpr.value
        assert full[key]["low"] < full[key]["value"] < full[key]["high"]
    nothing = {"value": None, "low": None, "high": None}
    assert summary(np.arange(3.0), np.ones(3, dtype=bool)) == {
        "n": 3,
        "positives": 3,
        "auroc": None,
        "log_auroc": None,
        "tpr_at_1pct_fpr": nothing,
        "tpr_at_0_1pct_fpr": nothing,
    }


def test_the_interval_of_the_auroc_holds_it_and_narrows_with_rows() -> None:
    wide, narrow = gaussian(1.0, n=40), gaussian(1.0, n=400)
    names = [[str(row) for row in range(len(rows[0]))] for rows in (wide, narrow)]
    spans = []
    for (scores, labels), groups in zip((wide, narrow), names, strict=True):
        found, area = auroc_interval(scores, labels, groups, resamples=200), auroc(scores, labels)
        assert found is not None
        assert area is not None
        assert found.low < area < found.high
        spans.append(found.high - found.low)
    assert spans[1] < spans[0] / 2


def test_rows_of_a_group_are_no_independent_evidence() -> None:
    scores, labels = gaussian(1.0, n=20)
    alone = auroc_interval(scores, labels, [str(row) for row in range(40)], resamples=200)
    repeated = auroc_interval(
        np.tile(scores, 10), np.tile(labels, 10), [str(row) for row in range(40)] * 10, resamples=200
    )
    assert alone == repeated


def test_the_interval_of_the_auroc_needs_both_classes() -> None:
    assert auroc_interval(np.array([1.0, 2.0]), np.array([True, True]), ["a", "b"]) is None


@pytest.mark.parametrize(("caught", "wider"), [(5, True), (10, False)])
def test_rows_of_one_context_are_no_independent_evidence(caught: int, wider: bool) -> None:
    scores = np.repeat([1.0] * caught + [-1.0] * (10 - caught) + [0.0], [8] * 10 + [100])
    labels, groups = np.arange(180) < 80, [f"context {row // 8}" for row in range(180)]
    found = tpr_interval(scores, labels, groups, 0.01, resamples=200)
    assert found is not None
    exact = clopper_pearson(8 * caught, 80)
    assert tpr_at_fpr(scores, labels, 0.01).tpr.value == caught / 10
    assert (found.low < exact.low - 0.05) is wider
    # Where all are caught no resample differs, and the exact interval stands.
    assert wider or found.low == exact.low


def simulated(draw: np.random.Generator, contexts: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return scores, labels and groups: of each context a negative and four positives, which share half a standard
    deviation; positives lie 2.7 standard deviations above."""
    shared, alone = 0.5, np.sqrt(0.75)
    context = draw.normal(0, shared, contexts)
    rows = np.concatenate([context, np.repeat(context, 4) + 2.7]) + draw.normal(0, alone, 5 * contexts)
    groups = [str(group) for group in [*range(contexts), *np.repeat(np.arange(contexts), 4)]]
    return rows, np.arange(5 * contexts) >= contexts, groups


@pytest.mark.parametrize(("contexts", "least"), [(82, 0.55), (300, 0.85)])
def test_the_interval_of_a_rate_holds_the_true_one(contexts: int, least: float) -> None:
    draw, held = np.random.default_rng(0), []
    true = 1 - NormalDist().cdf(NormalDist().inv_cdf(0.99) - 2.7)
    for _ in range(60):
        found = tpr_interval(*simulated(draw, contexts), 0.01, resamples=100)
        assert found is not None
        held.append(found.low <= true <= found.high)
    assert np.mean(held) >= least


def test_nothing_is_caught_where_no_threshold_keeps_to_the_rate() -> None:
    scores, labels = np.array([np.inf, np.inf, np.nan, np.inf]), np.array([True, True, False, False])
    found = tpr_interval(scores, labels, ["a", "b", "c", "d"], 0.01, resamples=50)
    assert found == Interval(0.0, clopper_pearson(0, 2).high)
    assert tpr_interval(scores, ~labels & False, ["a", "b", "c", "d"], 0.01) is None

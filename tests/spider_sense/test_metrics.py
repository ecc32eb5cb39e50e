import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spider_sense.errors import ConfigError, DataError
from spider_sense.metrics import auroc, log_auroc, roc_points, tpr_at_fpr
from spider_sense.rates import rate_above
from tests.labelled_rows import gaussian, rows_of

HALF_STEPS = st.integers(-6, 6).map(lambda steps: steps / 2)
ODD_SCORES = HALF_STEPS | st.sampled_from([np.nan, np.inf, -np.inf])


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

"""Bootstrap intervals against plain loops, and at the ends."""

import numpy as np
import pytest

from nest.intervals import group_mean, mean, paired_difference, ratio
from spider_sense.errors import DataError


def test_a_mean_and_its_interval_match_a_plain_bootstrap() -> None:
    values = np.random.default_rng(1).random(60) < 0.3
    found = mean(values.astype(float), seed=3)
    rng = np.random.default_rng(9)
    plain = [values[rng.integers(60, size=60)].mean() for _ in range(4000)]
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, (0.025, 0.975))), abs=0.02)
    assert found.n == 60


def test_the_seed_fixes_the_draws() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert mean(values, seed=1) == mean(values, seed=1)
    assert mean(values, resamples=50, seed=1) != mean(values, resamples=50, seed=2)


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 0.0362), (1.0, 0.9638, 1.0)])
def test_unanimous_outcomes_get_an_exact_interval(value: float, low: float, high: float) -> None:
    found = mean([value] * 100)
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high), abs=1e-4)


def test_a_ratio_weights_by_its_denominators() -> None:
    found = ratio([1.0, 30.0], [1.0, 10.0])
    assert found.value == pytest.approx(31 / 11)
    assert found.low == pytest.approx(1.0)
    assert found.high == pytest.approx(3.0)
    assert ratio([1.0, 30.0], [1.0, 10.0], exponent=True).high == pytest.approx(np.exp(3.0))


def test_groups_count_alike_whatever_their_size() -> None:
    found = group_mean([[1.0] * 10, [0.0, 1.0, 0.0, 1.0]])
    assert found.value == pytest.approx(0.75)
    assert found.n == 14
    assert 0.5 <= found.low < found.value < found.high <= 1.0


def test_paired_rows_that_agree_have_no_difference_whatever_their_spread() -> None:
    values = [0.0, 1.0] * 50
    same = paired_difference(values, values)
    assert (same.value, same.low, same.high) == pytest.approx((0.0, -0.0362, 0.0362), abs=1e-4)
    opposite = paired_difference([0.0] * 100, [1.0] * 100)
    assert (opposite.value, opposite.low, opposite.high) == pytest.approx((-1.0, -1.0, -0.9638), abs=1e-4)
    better = paired_difference([value + 0.5 for value in values], values)
    assert (better.value, better.low, better.high) == pytest.approx((0.5, 0.5, 0.5))


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        mean([])
    with pytest.raises(DataError, match="2 rows against 1"):
        paired_difference([1.0, 0.0], [1.0])
    with pytest.raises(DataError, match="1 numerators and 2"):
        ratio([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="no groups"):
        group_mean([])


def test_groups_that_agree_on_every_row_are_not_certain() -> None:
    same = group_mean([[0.0] * 20, [0.0] * 30], least=-1.0)
    assert same.low == -same.high
    assert mean([0.0] * 30).high < same.high < mean([0.0] * 20).high
    right = group_mean([[1.0] * 20, [0.0] * 20])
    assert (right.value, right.n) == (0.5, 40)
    assert 0.2 < right.low < 0.5 < right.high < 0.8
    assert group_mean([[0.0] * 20]).low == 0.0

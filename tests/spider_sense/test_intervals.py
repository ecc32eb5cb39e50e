"""Rates of what fails together."""

import pytest

from spider_sense.intervals import rate_interval, ratio_of_rounds


def test_families_that_fail_together_widen_the_interval() -> None:
    flags = [True] * 20 + [False] * 180
    one_family, _ = ["a"] * 20 + ["b"] * 180, None
    spread = [f"f{place}" for place in range(200)]
    _, together = rate_interval(flags, [f"{name}{place // 20}" for place, name in enumerate(one_family)], 500)
    _, apart = rate_interval(flags, spread, 500)
    assert together.high > apart.high
    assert together.low <= apart.low


def test_no_alarm_still_has_an_upper_end() -> None:
    rate, interval = rate_interval([False] * 50, ["a"] * 50, 100)
    assert rate == 0
    assert 0.05 < interval.high < 0.08


def test_a_ratio_of_rounds_is_of_the_same_round() -> None:
    under = [1.0, 10.0, 2.0, 5.0, 4.0]
    assert ratio_of_rounds([3 * value for value in under], under)[0] == pytest.approx(3)
    ratio, interval = ratio_of_rounds([1.0, 12.0, 1.8, 5.0, 4.4], under)
    assert ratio == pytest.approx(1.0)
    assert 0.9 <= interval.low <= 1.0 < interval.high <= 1.2

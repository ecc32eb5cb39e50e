"""Rates of what fails together."""

from spider_sense.intervals import rate_interval


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

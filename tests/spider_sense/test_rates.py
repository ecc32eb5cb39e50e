import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spider_sense.errors import ConfigError, MissingExtraError
from spider_sense.rates import Interval, clopper_pearson, most_within, rate_of


def test_clopper_pearson_against_published_values() -> None:
    # Zero of n: the upper end solves (1 - p)^n = 0.025.
    none, every = clopper_pearson(0, 299), clopper_pearson(10, 10)
    assert [none.low, none.high] == pytest.approx([0, 1 - 0.025 ** (1 / 299)])
    assert [every.low, every.high] == pytest.approx([0.025 ** (1 / 10), 1])
    # Newcombe, Statistics in Medicine 17 (1998), table I.
    interval = clopper_pearson(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2527, 0.3676)
    assert clopper_pearson(0, 0) == Interval(low=0.0, high=1.0)


def test_a_rate_of_no_rows_is_none_in_json() -> None:
    interval = clopper_pearson(1, 4)
    some = rate_of(np.array([True, False, False, False]))
    assert some.json() == {"value": 0.25, "low": interval.low, "high": interval.high}
    assert rate_of(np.empty(0, dtype=bool)).json() == {"value": None, "low": None, "high": None}


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

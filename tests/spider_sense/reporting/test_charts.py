import re
from itertools import pairwise

import pytest

from spider_sense.reporting.charts import _apart, _steps, time_chart
from spider_sense.reporting.figure import Scale, round_ticks
from spider_sense.reporting.report import Rate, System, Token, Track


def test_the_curve_climbs_only_at_its_points() -> None:
    none = Rate(value=None, low=None, high=None)
    roc = ((0.0, 0.1), (0.0005, 0.2), (0.02, 0.5), (0.3, 0.9))
    steps = _steps(System(name="guard", auroc=None, log_auroc=None, tpr=none, roc=roc))
    assert steps == [(0.001, 0.2), (0.02, 0.2), (0.02, 0.5), (0.1, 0.5)]


def test_labels_do_not_cover_each_other() -> None:
    places = _apart({"a": 100.0, "b": 101.0, "c": 249.0, "d": 250.0, "e": 20.0}, 30.0, 250.0)
    ordered = sorted(places.values())
    assert all(upper - lower >= 16 for lower, upper in pairwise(ordered))
    assert ordered[0] >= 30
    assert ordered[-1] <= 250


def test_a_logarithmic_scale_gives_each_decade_the_same_room() -> None:
    scale = Scale(low=0.001, high=0.1, start=0, stop=100, log=True)
    assert [scale(value) for value in (0.0, 0.001, 0.01, 0.1, 1.0)] == [0, 0, 50, 100, 100]


@pytest.mark.parametrize(("low", "high"), [(0.0, 47.0), (-3.2, 1.7), (0.0, 1.0), (2.95, 3.01), (-1e6, 2e6)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_the_readout_is_drawn_from_the_end_of_the_prompt_with_both_thresholds() -> None:
    readouts = [None, 0.5, 1.5, 0.25, None]
    tokens = [
        Token(text="x", position=9 + index, response=index > 1, logit=None, contribution=None, readout=readout)
        for index, readout in enumerate(readouts)
    ]
    track = Track(detector="a", meaning="", zone="clear", peak=1.5, suspect=2.0, breach=3.0, tokens=tuple(tokens))
    chart = time_chart(track)
    points = re.search(r'class="line readout" points="([^"]+)"', chart)
    assert points is not None
    xs = [float(pair.split(",")[0]) for pair in points[1].split()]
    assert xs == [46.0, 225.0, 404.0]
    assert "suspect 2.00" in chart
    assert "breach 3.00" in chart
    assert "peak 1.500 after 1 response tokens" in chart

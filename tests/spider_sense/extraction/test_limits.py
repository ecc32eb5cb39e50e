"""What thresholds rest on, and which of them nothing can cross."""

import math

import numpy as np
import pytest

from spider_sense.extraction.features import vector
from spider_sense.extraction.limits import Limit, limits
from spider_sense.extraction.state import fresh
from spider_sense.extraction.thresholds import CERTIFIED, Calibration, HonestGroup
from spider_sense.extraction.tiers import TieredDetector

DRAW = np.random.default_rng(0)


def _limit(
    detector: TieredDetector, tier: str, level: np.ndarray, work: list[str] | None = None, **how: object
) -> Limit:
    count = len(level)
    known = Calibration.fit(level, level, [""] * count, np.full(count, 64), work, **how)  # type: ignore[arg-type]
    (found,) = (limit for limit in limits(known, detector.population) if (limit.tier, limit.stratum) == (tier, ""))
    assert found.threshold == known.threshold(found.tier)
    return found


def test_a_threshold_says_what_set_it(uncalibrated: TieredDetector) -> None:
    few = DRAW.uniform(0, 0.1, CERTIFIED)
    by_people = _limit(uncalibrated, "own", few)
    assert (by_people.rests_on, by_people.margin, by_people.certified) == ("honest principals", -math.inf, True)
    kinds = [f"kind {place % 3}" for place in range(CERTIFIED)]
    spread = few + np.arange(CERTIFIED) % 3 / 50
    by_work = _limit(uncalibrated, "level", spread, kinds)
    assert (by_work.rests_on, by_work.threshold, by_work.never) == ("new kinds of work", by_work.margin, "")
    assert by_work.certified
    floor = uncalibrated.population.floors[""]
    assert _limit(uncalibrated, "level", few - 9, floors={"": floor}).rests_on == "highest of the fit"


def test_lives_that_are_too_short_for_a_tier_limit_nobody(uncalibrated: TieredDetector) -> None:
    short = _limit(uncalibrated, "own", np.full(CERTIFIED, -np.inf))
    assert (short.threshold, short.certified) == (math.inf, False)
    assert short.never == f"too few of {CERTIFIED} honest principals sent enough"
    one_sent = np.r_[np.full(CERTIFIED - 1, -np.inf), 2.0]
    # Six in a thousand of 299 are one.
    assert _limit(uncalibrated, "own", one_sent).threshold == 2.0


def test_where_nobody_can_be_limited_nothing_is_certified(uncalibrated: TieredDetector) -> None:
    many = DRAW.uniform(0, 0.1, CERTIFIED)
    one_kind = _limit(uncalibrated, "level", many, ["one"] * CERTIFIED)
    assert (one_kind.threshold, one_kind.certified) == (math.inf, False)
    assert "too few kinds of work, at least 2" in one_kind.never
    assert "`family`" in one_kind.remedy
    few = _limit(uncalibrated, "level", many[:100])
    assert few.never == "0.40% needs 249 honest principals, there are 100"
    assert few.remedy == "calibrate on more honest principals"
    assert _limit(uncalibrated, "own", many[:165]).never
    assert not _limit(uncalibrated, "own", many[:166]).never


def test_a_margin_above_all_that_a_level_can_reach_limits_nobody(uncalibrated: TieredDetector) -> None:
    kinds = [f"kind {place % 2}" for place in range(CERTIFIED)]
    apart = np.arange(CERTIFIED) % 2 + DRAW.uniform(0, 0.1, CERTIFIED)
    found = _limit(uncalibrated, "level", apart, kinds)
    assert uncalibrated.population.ceiling < found.threshold < math.inf
    assert f"nothing can exceed {uncalibrated.population.ceiling:.2f}" in found.never
    assert "more kinds of honest work" in found.remedy
    assert not found.certified
    # A group's score has no ceiling.
    groups = [HonestGroup("", f"kind {place % 5}", place % 5 / 5) for place in range(CERTIFIED)]
    assert not _limit(uncalibrated, "group", np.zeros(4), groups=groups).never


def test_the_ceiling_is_the_level_of_a_principal_that_does_its_utmost(uncalibrated: TieredDetector) -> None:
    population = uncalibrated.population
    states = fresh([1])
    states["count"] = states["sketched"] = 64
    states["probe"], states["history"][0, -1] = 4.0 * 64, 64
    states["opening_counts"][0, 0] = 64
    utmost = max(float(model.score(vector(states, population.centres))[0]) for model in population.levels.values())
    assert population.ceiling == pytest.approx(utmost)

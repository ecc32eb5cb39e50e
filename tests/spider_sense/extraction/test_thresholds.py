"""Thresholds over principals, and selection among them."""

import math

import numpy as np
import pytest

from spider_sense.errors import ConfigError
from spider_sense.extraction.discovery import benjamini_hochberg
from spider_sense.extraction.thresholds import CERTIFIED, KINDS, Budget, Calibration, HonestGroup


def _calibration(n: int, seed: int = 0, share: float = 0.01) -> Calibration:
    rng = np.random.default_rng(seed)
    budget = Budget(own=share, level=share, group=share)
    return Calibration.fit(rng.normal(size=n), rng.normal(size=n), [""] * n, np.full(n, 64), budget=budget)


def test_exchangeable_principals_are_alarmed_at_most_at_the_share() -> None:
    alarms = []
    for seed in range(300):
        calibration = _calibration(199, seed, share=0.05)
        new = np.random.default_rng(10_000 + seed).normal(size=200)
        alarms.append((new > calibration.threshold("own")).mean())
    # Exactly 5% on average, since 200 * 0.05 is whole; the standard error is about 0.1%.
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.004)


def test_an_alarm_is_a_p_value_of_at_most_the_share() -> None:
    calibration = _calibration(150, share=0.03)
    threshold = calibration.threshold("level")
    for score in np.linspace(-4, 4, 801):
        assert (score > threshold) == (calibration.p_value("level", "", float(score)) <= 0.03)


def test_a_principal_of_calibration_with_the_same_maximum_counts() -> None:
    maxima = np.array([1.0, 2.0, 2.0, 3.0])
    calibration = Calibration.fit(maxima, maxima, [""] * 4, np.full(4, 64))
    assert [calibration.p_value("own", "", score) for score in (0.5, 2.0, 2.5, 3.5)] == [1.0, 0.8, 0.4, 0.2]


def test_too_few_principals_alarm_nobody() -> None:
    assert _calibration(98).threshold("own") == math.inf
    assert _calibration(99).threshold("own") < math.inf
    assert _calibration(99, share=0.002).threshold("own") == math.inf


def test_a_stratum_is_judged_alone_once_it_is_certified() -> None:
    rng = np.random.default_rng(0)
    strata = ["app"] * CERTIFIED + ["bench"] * 40
    own = np.concatenate([rng.normal(0, 1, CERTIFIED), rng.normal(6, 1, 40)])
    calibration = Calibration.fit(
        own, own, strata, np.full(len(own), 64), budget=Budget(own=0.01, level=0.01, group=0.01)
    )
    alone = np.sort(own[:CERTIFIED])[-3]
    assert calibration.threshold("own", "app") == alone
    assert calibration.certified("own", "app")
    assert not calibration.certified("own", "bench")
    assert not calibration.certified("own", "never seen")
    # A small stratum can only raise the threshold of everybody.
    assert calibration.threshold("own", "bench") == own[CERTIFIED:].max()
    assert calibration.threshold("own", "never seen") == calibration.threshold("own")


@pytest.mark.parametrize(
    ("own", "strata", "says"),
    [
        (np.zeros(3), [""] * 2, "3 and 3 maxima for 2 strata and 3 lives"),
        (np.array([0, np.nan, 1]), [""] * 3, "is NaN"),
    ],
)
def test_bad_maxima_are_refused(own: np.ndarray, strata: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Calibration.fit(own, own, strata, np.full(3, 64))


def test_a_new_kind_of_work_may_lie_where_no_calibration_principal_does() -> None:
    """Kinds of work differ by far more than the principals of one kind."""
    alarms: list[float] = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        kinds = rng.normal(0, 1, 8).repeat(40)
        level = kinds + rng.normal(0, 0.1, len(kinds))
        names = [f"work {kind}" for kind in kinds]
        known = Calibration.fit(level, level, [""] * len(level), np.full(len(level), 64), names)
        new = rng.normal(0, 1) + rng.normal(0, 0.1, 50)
        alarms.append((new > known.threshold("level")).mean())
        assert known.threshold("own") <= known.threshold("level")
        one = float(np.nextafter(known.threshold("level"), 9))
        assert known.p_value("level", "", one) <= known.budget.level < known.p_value("level", "", one - 1e-6)
    assert np.mean(alarms) < 0.02
    alone = Calibration.fit(level, level, [""] * len(level), np.full(len(level), 64), ["work"] * len(level))
    assert alone.threshold("level") == math.inf
    assert alone.threshold("own") < math.inf


def test_nobody_is_limited_below_the_level_of_those_who_were_fitted_on() -> None:
    level = np.random.default_rng(0).normal(size=600)
    strata = ["app"] * 300 + ["chat"] * 300
    high = Calibration.fit(level, level, strata, np.full(600, 64), floors={"": 7.0, "app": 9.0, "chat": -9.0})
    assert (high.threshold("level"), high.threshold("level", "app")) == (7.0, 9.0)
    assert high.threshold("level", "chat") < 5
    assert high.threshold("level", "app", share=0.05) < 3


def test_a_claim_ends_where_the_lives_of_calibration_end() -> None:
    lives = np.concatenate([np.full(CERTIFIED, 400), np.full(CERTIFIED, 100), np.arange(1, CERTIFIED)])
    strata = ["app"] * CERTIFIED + ["chat"] * CERTIFIED + ["bench"] * (CERTIFIED - 1)
    calibration = Calibration.fit(np.zeros(len(lives)), np.zeros(len(lives)), strata, lives)
    assert dict(calibration.horizons) == {"app": 400, "chat": 100, "": 400}
    assert calibration.certified("own", "app", 400)
    assert not calibration.certified("own", "app", 401)
    assert not calibration.certified("level", "chat", 101)
    assert not calibration.certified("own", "bench", 1)


def test_short_lives_lower_no_threshold_of_long_ones() -> None:
    """Most of a real log lives short; the maxima of those are low, and so would the threshold of all be."""
    budget = Budget()
    above: dict[int, list[float]] = {25: [], 310: []}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        lives = np.r_[np.full(CERTIFIED, 310), np.full(2000, 25)]
        # The maximum of so many uniform numbers.
        highest = rng.random(len(lives)) ** (1 / lives)
        known = Calibration.fit(highest, highest, [""] * len(lives), lives)
        assert known.certified("own", "", 310)
        for life, found in above.items():
            found.append((rng.random(2000) ** (1 / life) > known.threshold("own")).mean())
        for score in 1 - rng.random(50) / 5000:
            assert (score > known.threshold("own")) == (known.p_value("own", "", score) <= budget.own)
    assert np.mean(above[310]) < budget.own
    # Those who live short may be the higher ones: the bound is over all, too.
    lively = Calibration.fit(2 - highest, 2 - highest, [""] * len(lives), lives)
    assert lively.threshold("own") == np.sort(2 - highest)[-13]
    kinds = ["one"] * CERTIFIED + [f"kind {place % 9}" for place in range(2000)]
    assert Calibration.fit(highest, highest, [""] * len(lives), lives, kinds).threshold("level") == math.inf


def test_a_small_share_takes_more_long_lives() -> None:
    lives, draw = np.arange(1, 1001), np.random.default_rng(0).random(1000)
    small = Calibration.fit(draw, draw, [""] * 1000, lives, budget=Budget(level=0.002))
    assert small.horizons[""] == 1000 - 499 + 1
    assert small.threshold("level") < math.inf
    assert Calibration.fit(draw, draw, [""] * 1000, lives).horizons[""] == 1000 - CERTIFIED + 1


def _grouped(groups: list[HonestGroup]) -> Calibration:
    return Calibration.fit(np.zeros(4), np.zeros(4), [""] * 4, np.full(4, 64), groups=groups)


def test_groups_have_strata_of_their_own() -> None:
    groups = [HonestGroup("app", f"work {place}", 2.0 + place / 1000) for place in range(CERTIFIED)]
    groups += [HonestGroup("chat", f"talk {place}", place / 1000) for place in range(9)]
    known = _grouped([*groups, HonestGroup("", None, 5.0)])
    assert {name: len(found) for name, found in known.maxima["group"].items()} == {"": 309, "app": 299, "chat": 9}
    assert known.certified("group", "app")
    assert not known.certified("group", "chat")
    assert known.threshold("group", "app", 0.01) == 2.296
    assert known.threshold("group", "chat", 0.01) == known.threshold("group", "", 0.01) == 2.297
    assert 2.29 < known.threshold("group", "app") < 2.4


def test_groups_of_few_kinds_of_work_are_not_limited() -> None:
    """Groups with one kind of work are alike; the next kind is a stranger, whatever mixed groups look like."""
    draw = np.random.default_rng(0)

    def groups(kinds: int, tenant: str) -> list[HonestGroup]:
        alone = [
            HonestGroup(tenant, f"work {place % kinds}", place % kinds + draw.normal(0, 0.1)) for place in range(250)
        ]
        return [*alone, *(HonestGroup(tenant, None, draw.normal(1, 0.1)) for _ in range(250))]

    few, many = _grouped(groups(KINDS - 1, "tutoring")), _grouped(groups(KINDS, "chat"))
    assert few.threshold("group", "tutoring") == few.threshold("group", "") == math.inf
    assert few.threshold("group", "tutoring", share=0.05) < 4
    assert 5 < many.threshold("group", "chat") < math.inf
    # A type with few groups is not judged by everybody's, if its own kinds are few.
    both = _grouped(groups(KINDS, "chat") + groups(2, "tutoring")[240:260])
    assert both.threshold("group", "") < both.threshold("group", "tutoring") == math.inf


def test_a_group_of_unknown_work_is_no_kind_and_certifies_nothing() -> None:
    draw = np.random.default_rng(0)

    def groups(count: int, work: str | None = None) -> list[HonestGroup]:
        return [
            HonestGroup("app", f"kind {place % 5}" if work is None else work, place % 5 / 5 + draw.normal(0, 0.05))
            for place in range(count)
        ]

    unknown = _grouped(groups(320, ""))
    assert unknown.threshold("group", "app") == math.inf
    assert unknown.unnamed_groups == 320
    assert not unknown.certified("group", "app")
    known = _grouped(groups(320))
    assert known.threshold("group", "app") < math.inf
    assert known.certified("group", "app")
    assert not _grouped([*groups(320), *groups(1, "")]).certified("group", "app")


def test_rules_have_no_share() -> None:
    with pytest.raises(ConfigError, match="deterministic"):
        Budget().share("rule")


def test_selection_follows_benjamini_and_hochberg() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        p = np.concatenate([rng.random(30), rng.random(5) * 0.01])
        n, rate = len(p), 0.1
        most = max((k for k in range(1, n + 1) if (p <= rate * k / n).sum() >= k), default=0)
        expected = p <= rate * most / n if most else np.zeros(n, dtype=bool)
        np.testing.assert_array_equal(benjamini_hochberg(p, rate), expected)
    assert benjamini_hochberg(np.zeros(0), 0.1).tolist() == []

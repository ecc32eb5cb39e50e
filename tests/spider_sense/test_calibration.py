import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from spider_sense.calibration import LENGTH_BUCKETS, BucketThresholds, Calibration, calibrate, zone
from spider_sense.errors import ConfigError, DataError
from spider_sense.types import Zone

Scores = npt.NDArray[np.floating[Any]]
Tokens = npt.NDArray[np.int64]

RATES = st.floats(0.001, 0.6)
SCORES = st.lists(st.floats(-1e6, 1e6) | st.integers(-3, 3).map(float), min_size=1, max_size=130)


def names(n: int) -> list[str]:
    return [f"benign-{index}" for index in range(n)]


def one_length(scores: Scores, suspect_fpr: float, breach_fpr: float, tokens: int = 20) -> Calibration:
    return calibrate(scores, np.full(scores.size, tokens), names(scores.size), suspect_fpr, breach_fpr)


def growing(per_bucket: tuple[int, int, int, int], seed: int = 0) -> tuple[Scores, Tokens]:
    """Benign maxima that grow with length, so many to each bucket."""
    generator = np.random.default_rng(seed)
    tokens = np.repeat([20, 100, 400, 2000], per_bucket)
    return generator.normal(np.log(tokens), 1.0), tokens


def rates_of(first: float, second: float) -> tuple[float, float]:
    return max(first, second), min(first, second)


@given(SCORES, RATES, RATES)
def test_no_more_benign_conversations_reach_a_threshold_than_its_target(
    values: list[float], first: float, second: float
) -> None:
    scores = np.array(values)
    bucket = one_length(scores, *rates_of(first, second)).thresholds(20)
    for threshold in (bucket.suspect, bucket.breach):
        assert threshold.exceed == np.count_nonzero(~(scores < threshold.value))
        assert threshold.exceed / scores.size <= threshold.target_fpr
    assert bucket.suspect.value <= bucket.breach.value


@given(SCORES, RATES, RATES)
def test_thresholds_fall_as_the_rate_allowed_grows(values: list[float], first: float, second: float) -> None:
    scores = np.array(values)
    loose, strict = rates_of(first, second)
    high = one_length(scores, strict, strict).thresholds(2000).breach
    low = one_length(scores, loose, loose).thresholds(2000).breach
    assert low.value <= high.value


@settings(max_examples=30)
@given(st.tuples(*[st.integers(0, 120)] * 4).filter(any), st.integers(0, 5))
def test_in_no_bucket_does_the_realised_rate_exceed_the_target(
    per_bucket: tuple[int, int, int, int], seed: int
) -> None:
    scores, tokens = growing(per_bucket, seed)
    calibration = calibrate(scores, tokens, names(scores.size), 0.1, 0.02)
    for bucket, count, length in zip(calibration.buckets, per_bucket, (20, 100, 400, 2000), strict=True):
        rows = scores if bucket.pooled else scores[tokens == length]
        assert bucket.pooled == (count < 50)
        assert bucket.breach.n == rows.size
        assert np.count_nonzero(rows >= bucket.breach.value) / rows.size <= 0.02
        assert np.count_nonzero(rows >= bucket.suspect.value) / rows.size <= 0.1


def test_a_threshold_lies_half_way_between_neighbours() -> None:
    bucket = one_length(np.arange(100.0), 0.05, 0.01).thresholds(20)
    assert (bucket.suspect.value, bucket.suspect.exceed) == (94.5, 5)
    assert (bucket.breach.value, bucket.breach.exceed) == (98.5, 1)


def test_a_rate_too_small_for_the_set_leaves_a_margin_over_the_maximum() -> None:
    breach = one_length(np.arange(101.0), 0.05, 0.001).thresholds(20).breach
    assert breach.value == pytest.approx(100 + 0.05 * 50)
    assert breach.exceed == 0
    constant = one_length(np.full(10, 3.0), 0.5, 0.001).thresholds(20).breach
    assert constant.value == np.nextafter(3.0, np.inf)


def test_neighbouring_floats_stay_apart() -> None:
    above = np.nextafter(1.0, np.inf)
    assert (1.0 + above) / 2 == 1.0
    breach = one_length(np.array([1.0] * 99 + [above]), 0.05, 0.01).thresholds(20).breach
    assert (breach.value, breach.exceed) == (above, 1)


def test_support_needs_the_rule_of_three() -> None:
    def breach_of(n: int) -> BucketThresholds:
        return one_length(np.arange(float(n)), 0.05, 0.01).thresholds(20)

    assert (breach_of(298).breach.needed, breach_of(298).suspect.needed) == (299, 59)
    assert not breach_of(298).breach.supported
    assert breach_of(299).breach.supported
    assert one_length(np.arange(9.0), 0.05, 0.001).thresholds(20).breach.needed == 2995
    assert math.pow(1 - 0.001, 2995) <= 0.05 < math.pow(1 - 0.001, 2994)


def test_the_interval_covers_the_true_rate() -> None:
    # Uniform scores: the true rate above a threshold is one minus it.
    covered = 0
    for seed in range(200):
        breach = one_length(np.random.default_rng(seed).random(200), 0.05, 0.02).thresholds(20).breach
        covered += breach.fpr_low <= 1 - breach.value <= breach.fpr_high
    assert covered >= 186


def test_a_pooled_bucket_is_never_below_the_nearest_shorter_one_with_its_own() -> None:
    scores, tokens = growing((100, 100, 100, 3))
    scores[tokens == 400] += 50
    calibration = calibrate(scores, tokens, names(scores.size), 0.5, 0.4)
    own, longest = calibration.buckets[2], calibration.buckets[3]
    assert [bucket.pooled for bucket in calibration.buckets] == [False, False, False, True]
    assert longest.breach.value == own.breach.value
    assert longest.suspect.value == own.suspect.value
    assert longest.breach.n == 303
    assert longest.breach.exceed == np.count_nonzero(scores >= own.breach.value)


def test_a_small_bucket_takes_the_threshold_of_the_whole_set() -> None:
    scores, tokens = growing((10, 0, 300, 300))
    calibration = calibrate(scores, tokens, names(610), 0.05, 0.01)
    whole = one_length(scores, 0.05, 0.01).thresholds(20)
    assert [bucket.pooled for bucket in calibration.buckets] == [True, True, False, False]
    assert calibration.buckets[0].breach == calibration.buckets[1].breach == whole.breach


@pytest.mark.parametrize(
    ("count", "breach_fpr", "pooled"), [(49, 0.5, True), (50, 0.5, False), (99, 0.01, True), (100, 0.01, False)]
)
def test_a_bucket_of_its_own_needs_enough_conversations(count: int, breach_fpr: float, pooled: bool) -> None:
    assert one_length(np.arange(float(count)), 0.5, breach_fpr).thresholds(20).pooled == pooled


def test_buckets_end_with_their_bound() -> None:
    calibration = one_length(np.arange(10.0), 0.2, 0.1)
    assert [bucket.max_tokens for bucket in calibration.buckets] == [32, 128, 512, None]
    assert LENGTH_BUCKETS[-1] == math.inf
    for tokens, max_tokens in ((1, 32), (32, 32), (33, 128), (512, 512), (513, None), (10**9, None)):
        assert calibration.thresholds(tokens).max_tokens == max_tokens


def test_values_agree_with_thresholds() -> None:
    scores, tokens = growing((100, 100, 100, 100))
    calibration = calibrate(scores, tokens, names(400))
    lengths = np.array([1, 32, 33, 512, 513, 5000])
    expected = [calibration.thresholds(int(length)).breach.value for length in lengths]
    assert calibration.values("breach", lengths).tolist() == expected
    assert len(set(expected)) == 4


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (94.4, "clear"),
        (94.5, "suspect"),
        (98.4, "suspect"),
        (98.5, "breach"),
        (math.inf, "breach"),
        (math.nan, "breach"),
        (-math.inf, "clear"),
    ],
)
def test_zone(score: float, expected: Zone) -> None:
    assert zone(score, one_length(np.arange(100.0), 0.05, 0.01).thresholds(20)) == expected


def test_the_digest_names_the_set_whatever_its_order() -> None:
    scores, tokens = growing((5, 5, 5, 5))
    forward = calibrate(scores, tokens, names(20), 0.2, 0.1)
    backward = calibrate(scores[::-1], tokens[::-1], names(20)[::-1], 0.2, 0.1)
    other = calibrate(scores, tokens, [*names(19), "benign-x"], 0.2, 0.1)
    assert forward == backward
    assert forward.digest != other.digest
    assert (forward.n, forward.horizon_tokens) == (20, 2000)


def test_json_round_trip() -> None:
    scores, tokens = growing((60, 60, 60, 2))
    calibration = calibrate(scores, tokens, names(182), 0.2, 0.1)
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


def test_buckets_out_of_order_are_refused() -> None:
    document = one_length(np.arange(10.0), 0.2, 0.1).model_dump()
    for buckets in (document["buckets"][::-1], document["buckets"][:3], ()):
        with pytest.raises(ValidationError, match="the bounds must rise"):
            Calibration.model_validate({**document, "buckets": buckets})


@pytest.mark.parametrize(
    ("suspect_fpr", "breach_fpr", "message"),
    [
        (0.0, 0.0, r"suspect_fpr=0\.0"),
        (0.5, 1.0, r"breach_fpr=1\.0"),
        (math.nan, 0.01, "suspect_fpr=nan"),
        (0.01, 0.05, r"breach_fpr=0\.05 is above suspect_fpr=0\.01"),
    ],
)
def test_impossible_rates_are_refused(suspect_fpr: float, breach_fpr: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        one_length(np.arange(10.0), suspect_fpr, breach_fpr)


@pytest.mark.parametrize(
    ("scores", "tokens", "ids", "message"),
    [
        ([], [], [], "no benign conversation"),
        ([1.0, math.nan], [5, 5], ["a", "b"], "score nan of 'b'"),
        ([math.inf, 1.0], [5, 5], ["a", "b"], "score inf of 'a'"),
        ([1.0, 2.0], [5, 0], ["a", "b"], "token count 0 of 'b'"),
        ([1.0, 2.0], [5, 5], ["a", "a"], "id 'a' occurs 2 times"),
        ([1.0, 2.0], [5], ["a", "b"], "vectors of one length"),
        ([1.0, 2.0], [5, 5], ["a"], "1 ids"),
    ],
)
def test_unusable_sets_are_refused(scores: list[float], tokens: list[int], ids: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibrate(np.array(scores), np.array(tokens, dtype=np.int64), ids)

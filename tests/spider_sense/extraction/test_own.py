"""Own history: the recurrences against plain loops, and what they promise on exchangeable streams."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from spider_sense.extraction.layout import BINS, DIRECTIONS, FROZEN, States
from spider_sense.extraction.mixing import mix, uniform
from spider_sense.extraction.own import FORGETTING, LEAST, SHORTEST, bet, binned, statistic
from spider_sense.extraction.state import fresh

EVERY = np.ones(DIRECTIONS, dtype=bool)


def _run(bins_TNJ: NDArray[np.int64], seeds: list[int]) -> tuple[States, NDArray[np.float64]]:
    states, path = fresh(seeds), []
    for bins_NJ in bins_TNJ:
        states["sketched"] += 1
        path.append(bet(states, bins_NJ, EVERY))
    return states, np.array(path)


def _plain(bins: list[int], seed: int) -> list[float]:
    """One direction by loops: ln M of both baselines."""
    stream = np.uint64(0x5851F42D4C957F2D)
    m = np.zeros(2)
    for t, now in enumerate(bins):
        u = float(uniform(mix(np.array([np.uint64(seed) ^ stream]), np.array([t], dtype=np.uint64)))[0])
        for which, past in enumerate((bins[:t], bins[: min(t, FROZEN)])):
            if t < (LEAST, FROZEN)[which]:
                continue
            weights = [float(FORGETTING) ** (t - 1 - k) if which == 0 else 1.0 for k in range(len(past))]
            above = sum(weight for b, weight in zip(past, weights, strict=True) if b > now)
            same = sum(weight for b, weight in zip(past, weights, strict=True) if b == now)
            k, total = above + same + 1, sum(weights) + 1
            p = (above + u * (same + 1)) / total if which == 0 else min((k + 2 * k**0.5) / total, 1)
            m[which] = (m[which] + 1) / (2 * p**0.5)
    with np.errstate(divide="ignore"):
        return list(np.log(m))


def test_bets_follow_the_recurrence() -> None:
    rng = np.random.default_rng(3)
    bins = rng.integers(0, BINS, (90, 1, DIRECTIONS))
    bins[70:, 0, 5] = BINS - 1  # a change in one direction
    states, path = _run(bins, [77])
    for direction in (0, 5, DIRECTIONS - 1):
        expected = _plain(bins[:, 0, direction].tolist(), 77)
        np.testing.assert_allclose(states["bets"][0, :, direction], expected, rtol=2e-5, atol=2e-5)
    m = np.exp(states["bets"][0].astype(np.float64))
    assert path[-1, 0] == pytest.approx(math.log(m.mean()) - math.log(max(90 - LEAST, SHORTEST)), abs=1e-4)


def test_histograms_forget_count_and_stop() -> None:
    bins = np.random.default_rng(0).integers(0, BINS, (80, 3, DIRECTIONS))
    states, _ = _run(bins, [1, 2, 3])
    weights = float(FORGETTING) ** np.arange(79, -1, -1)
    for row in range(3):
        np.testing.assert_array_equal(states["history"][row], np.bincount(bins[:, row, 0], minlength=BINS))
        for direction in range(DIRECTIONS):
            recent = np.bincount(bins[:, row, direction], weights, minlength=BINS)
            np.testing.assert_allclose(states["recent"][row, direction], recent, rtol=1e-5)
            first = np.bincount(bins[:FROZEN, row, direction], minlength=BINS)
            np.testing.assert_array_equal(states["frozen"][row, direction], first)


def test_exchangeable_streams_give_no_evidence() -> None:
    count, length = 400, 200
    bins = np.random.default_rng(1).integers(0, BINS, (length, count, DIRECTIONS))
    _, path = _run(bins, list(range(1, count + 1)))
    # An e-value of M / n is on average 1: Ville's inequality, with the little that forgetting costs.
    assert (path.max(axis=0) > math.log(100)).mean() < 0.01


def test_a_turn_is_found_as_fast_after_a_long_past() -> None:
    early, late = (
        _run(np.repeat(np.array([0] * before + [3] * 20), DIRECTIONS).reshape(-1, 1, DIRECTIONS), [5])[1][-1, 0]
        for before in (100, 1000)
    )
    placed = math.log((1020 - LEAST) / (120 - LEAST))
    assert early > 3
    assert late > early - placed


def test_evidence_of_an_honest_change_ends() -> None:
    bins = np.repeat(np.array([0] * 200 + [3] * 300), DIRECTIONS).reshape(-1, 1, DIRECTIONS)
    states, _ = _run(bins[:350], [5])
    later, _ = _run(bins, [5])
    # The frozen baseline goes on; the recent one knows the new subject.
    assert (later["bets"][0, 0] < states["bets"][0, 0]).all()


def test_smoothed_p_values_are_uniform() -> None:
    from scipy.stats import kstest

    from spider_sense.extraction.own import _smoothed, _tails

    rng = np.random.default_rng(5)
    bins_TJ = rng.integers(0, 4, (41, 3000))
    counts = np.stack([(bins_TJ[:-1] == b).sum(axis=0) for b in range(4)], axis=1)[:, None]
    p = _smoothed(*_tails(counts, bins_TJ[-1][:, None]), rng.random(3000))
    assert kstest(p[:, 0], "uniform").pvalue > 1e-3


def test_a_stream_without_bets_has_no_evidence() -> None:
    states = fresh([9])
    assert statistic(states, EVERY)[0] == -np.inf


def test_everyday_values_share_a_bin_and_campaigns_do_not() -> None:
    edges = np.array([[1.0, 2.0, 4.0]] * DIRECTIONS, dtype=np.float32)
    rows = np.array([[-9.0] * DIRECTIONS, [0.9] * DIRECTIONS, [3.0] * DIRECTIONS, [5.0] * DIRECTIONS], dtype=np.float32)
    assert binned(rows, edges)[:, 0].tolist() == [0, 0, 2, 3]
    # A principal that goes from one everyday value to another gives no evidence; one that turns to a campaign does.
    innocent, other = (
        _run(np.repeat(np.array([0] * 60 + [last] * 40), DIRECTIONS).reshape(100, 1, DIRECTIONS), [5])[1][-1, 0]
        for last in (0, 3)
    )
    assert innocent < 2 < 8 < other

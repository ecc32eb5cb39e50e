"""Own history: the recurrences against plain loops, and what they promise on exchangeable streams."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from spider_sense.extraction.layout import BETS, BINS, DIRECTIONS, FROZEN, States
from spider_sense.extraction.mixing import mix, uniform
from spider_sense.extraction.own import LEAST, SHORTEST, bet, binned, statistic
from spider_sense.extraction.state import fresh

EVERY = np.ones(DIRECTIONS, dtype=bool)


def _run(bins_TNJ: NDArray[np.int64], seeds: list[int]) -> tuple[States, NDArray[np.float64]]:
    states, path = fresh(seeds), []
    for bins_NJ in bins_TNJ:
        states["sketched"] += 1
        path.append(bet(states, bins_NJ, EVERY))
    return states, np.array(path)


def _plain(bins: list[int], seed: int) -> list[float]:
    """One direction by loops: ln M of both baselines and all bets, as [2 * K]."""
    stream = np.uint64(0x5851F42D4C957F2D)
    m = np.zeros((2, len(BETS)))
    for t, now in enumerate(bins):
        u = float(uniform(mix(np.array([np.uint64(seed) ^ stream]), np.array([t], dtype=np.uint64)))[0])
        for which, past in enumerate((bins[:t], bins[: min(t, FROZEN)])):
            if t < (LEAST, FROZEN)[which]:
                continue
            above, same = sum(b > now for b in past), sum(b == now for b in past)
            k = above + same + 1
            p = (above + u * (same + 1)) / (len(past) + 1) if which == 0 else min((k + 2 * k**0.5) / (len(past) + 1), 1)
            for index, kappa in enumerate(BETS):
                m[which, index] = (m[which, index] + 1) * kappa * p ** (kappa - 1)
    with np.errstate(divide="ignore"):
        return list(np.log(m).ravel())


def test_bets_follow_the_recurrence() -> None:
    rng = np.random.default_rng(3)
    bins = rng.integers(0, BINS, (90, 1, DIRECTIONS))
    bins[70:, 0, 5] = BINS - 1  # a change in one direction
    states, path = _run(bins, [77])
    for direction in (0, 5, DIRECTIONS - 1):
        expected = _plain(bins[:, 0, direction].tolist(), 77)
        np.testing.assert_allclose(states["bets"][0, :, direction].ravel(), expected, rtol=2e-5, atol=2e-5)
    m = np.exp(states["bets"][0].astype(np.float64))
    assert path[-1, 0] == pytest.approx(math.log(m.mean()) - math.log(max(90 - LEAST, SHORTEST)), abs=1e-4)


def test_histories_count_every_request_and_the_frozen_one_stops() -> None:
    bins = np.random.default_rng(0).integers(0, BINS, (80, 3, DIRECTIONS))
    states, _ = _run(bins, [1, 2, 3])
    for direction in range(DIRECTIONS):
        for row in range(3):
            counts = np.bincount(bins[:, row, direction], minlength=BINS)
            np.testing.assert_array_equal(states["history"][row, direction], counts)
            first = np.bincount(bins[:FROZEN, row, direction], minlength=BINS)
            np.testing.assert_array_equal(states["frozen"][row, direction], first)


def test_the_growing_baseline_keeps_its_bound_on_exchangeable_streams() -> None:
    count, length = 400, 120
    bins = np.random.default_rng(1).integers(0, BINS, (length, count, DIRECTIONS))
    states, highest = fresh(list(range(1, count + 1))), np.zeros(count)
    for turn, bins_NJ in enumerate(bins):
        states["sketched"] += 1
        bet(states, bins_NJ, EVERY)
        m = np.exp(states["bets"][:, 0].astype(np.float64))
        highest = np.maximum(highest, m.mean(axis=(1, 2)))
        if turn == LEAST + 19:
            # M - n is a martingale, so the mean of M after 20 bets is 20; the mildest bet has a finite variance.
            assert m[..., -1].mean() == pytest.approx(20, rel=0.1)
    bets = length - LEAST
    for c in (500, 2000):
        assert (highest >= c).mean() <= bets / c + 2 * math.sqrt(bets / c / count)


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

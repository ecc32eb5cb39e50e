"""The fold against a plain sequential oracle in float64: any chunking, interleaving, row order and padding."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sense_kernels import PROMPT, RESPONSE, TAIL, WATCHED, FoldRows, Lane, LaneTable, fold_torch, readout_torch

ALL, WINDOW = PROMPT | RESPONSE, 3
LANES = [
    Lane(kind="mean", head=0, value=0),
    Lane(kind="max", head=1, value=1),
    Lane(kind="ema_max", head=2, value=0, param=0.3, window=4),
    Lane(kind="attention", head=3, value=0, query=1, param=1.5),
    Lane(kind="attention", head=3, value=2, query=2),
    Lane(kind="cusum", head=4, value=2, param=0.2),
    Lane(kind="rolling_mean_max", head=5, value=0, window=WINDOW),
    Lane(kind="rolling_attention", head=6, value=1, query=2, window=WINDOW),
    Lane(kind="mean", head=7, value=2, span=TAIL),
    Lane(kind="rolling_mean_max", head=8, value=1, window=WINDOW, span=RESPONSE),
]
HEADS = 9


def _softmax_mean(q: list[float], v: list[float]) -> float:
    top = max(q)
    w = [math.exp(x - top) for x in q]
    return sum(a * b for a, b in zip(w, v, strict=True)) / sum(w)


def _mean(x: list[float]) -> float:
    return sum(x) / len(x)


def _windows(x: list[float]) -> list[list[float]]:
    return [x[i : i + WINDOW] for i in range(len(x) - WINDOW + 1)] or [x]


def _ema_max(x: list[float], alpha: float, warm_up: int) -> float:
    e, best = 0.0, -math.inf
    for t, z in enumerate(x, start=1):
        e += max(alpha, 1 / t) * (z - e)
        if t >= warm_up:
            best = max(best, e)
    return best if len(x) >= warm_up else e


def _cusum(x: list[float], kappa: float) -> float:
    g = best = 0.0
    best = -math.inf
    for z in x:
        g = max(0.0, g + z - kappa)
        best = max(best, g)
    return best


def oracle(z: np.ndarray, codes: np.ndarray) -> list[float]:
    """Whole-sequence value of every head, straight from the definitions."""

    def column(c: int, span: int = ALL) -> list[float]:
        return [float(x) for x in z[(codes & span) != 0, c]]

    def guarded(x: list[float], f: Callable[[], float]) -> float:
        return f() if x else -math.inf

    z0, z1, z2 = column(0), column(1), column(2)
    tail, reply = column(2, TAIL), column(1, RESPONSE)
    pairs = list(zip(_windows(z2), _windows(z1), strict=True))
    return [
        guarded(z0, lambda: _mean(z0)),
        guarded(z1, lambda: max(z1)),
        guarded(z0, lambda: _ema_max(z0, 0.3, 4)),
        guarded(z0, lambda: _softmax_mean([1.5 * x for x in z1], z0) + _softmax_mean(z2, z2)),
        guarded(z2, lambda: _cusum(z2, 0.2)),
        guarded(z0, lambda: max(_mean(w) for w in _windows(z0))),
        guarded(z1, lambda: max(_softmax_mean(q, v) for q, v in pairs)),
        guarded(tail, lambda: _mean(tail)),
        guarded(reply, lambda: max(_mean(w) for w in _windows(reply))),
    ]


def _codes(prompt: int, total: int) -> np.ndarray:
    positions = np.arange(total)
    code: np.ndarray = np.where(positions < prompt, PROMPT, RESPONSE)
    code |= np.where((positions < prompt) & (positions >= prompt - 2), TAIL, 0)
    code |= np.where(positions >= prompt - 1, WATCHED, 0)
    return code


@st.composite
def traffic(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray], list[list[int]], int]:
    """Sequences, their row codes, for each the lengths of its chunks, and a seed for the order of rows."""
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    scale = draw(st.sampled_from([0.1, 1.0, 8.0]))
    sequences, codes, chunks = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        prompt, reply = draw(st.integers(1, 14)), draw(st.integers(0, 6))
        sequences.append(rng.normal(0, scale, (prompt + reply, 3)).astype(np.float32))
        codes.append(_codes(prompt, prompt + reply))
        cut, left = [], prompt + reply
        while left:
            cut.append(draw(st.integers(1, left)))
            left -= cut[-1]
        chunks.append(cut)
    return sequences, codes, chunks, seed


def _feed(
    sequences: list[np.ndarray], codes: list[np.ndarray], chunks: list[list[int]], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Interleave the chunks of all sequences at random, scatter rows among padding, and fold step by step."""
    rng = np.random.default_rng(seed)
    table = LaneTable(LANES, HEADS)
    state, count, peak = table.new_state(len(sequences) + 2)
    slots = rng.permutation(len(sequences) + 2)[: len(sequences)]
    done, queue = [0] * len(sequences), [list(c) for c in chunks]
    while any(queue):
        active = [i for i in rng.permutation(len(sequences)) if queue[i] and rng.random() < 0.7]
        lengths = [queue[i].pop(0) for i in active]
        total = sum(lengths)
        place = rng.permutation(total + 3)[:total]
        logits = torch.full((total + 3, 3), torch.nan)
        code, start = [], np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        for i, first, n in zip(active, start, lengths, strict=False):
            rows = slice(done[i], done[i] + n)
            logits[torch.from_numpy(place[first : first + n])] = torch.from_numpy(sequences[i][rows])
            code.append(codes[i][rows])
            done[i] += n
        if total:
            fold_rows = FoldRows(place, np.concatenate(code), start, slots[active])
            fold_torch(state, count, peak, logits, fold_rows, table)
    index = torch.from_numpy(slots)
    return readout_torch(state, count, index, table), peak[index], count


@settings(max_examples=150, deadline=None)
@given(traffic())
def test_any_chunking_gives_the_whole_sequence_value(
    case: tuple[list[np.ndarray], list[np.ndarray], list[list[int]], int],
) -> None:
    sequences, codes, chunks, seed = case
    readout, peak, _ = _feed(sequences, codes, chunks, seed)
    for i, (z, code) in enumerate(zip(sequences, codes, strict=True)):
        want = oracle(z.astype(np.float64), code)
        np.testing.assert_allclose(readout[i].numpy(), want, rtol=1e-5, atol=1e-5)
        watched = np.flatnonzero(code & WATCHED)
        over_time = np.max([oracle(z[: t + 1].astype(np.float64), code[: t + 1]) for t in watched], axis=0)
        np.testing.assert_allclose(peak[i].numpy(), over_time, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 4, 9])
def test_a_bad_logit_poisons_every_head_that_reads_it(bad: float, where: int) -> None:
    z = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    z[where, :] = bad
    _, peak, _ = _feed([z], [_codes(10, 16)], [[5, 5, 1, 1, 4]], 0)
    sees_prompt = [lane.head for lane in LANES if lane.span == ALL]
    assert peak[0, sees_prompt].isnan().all()


def test_rows_of_a_request_do_not_touch_other_slots() -> None:
    table = LaneTable(LANES, HEADS)
    state, count, peak = table.new_state(3)
    before = state.clone(), count.clone(), peak.clone()
    rows = FoldRows(np.arange(4), _codes(4, 4), np.array([0, 4]), np.array([1]))
    fold_torch(state, count, peak, torch.randn(4, 3), rows, table)
    for now, then in zip((state, count, peak), before, strict=True):
        assert torch.equal(now[[0, 2]], then[[0, 2]])
    assert not torch.equal(count[1], before[1][1])


def test_trace_holds_the_readout_at_each_watched_row() -> None:
    z, code = torch.randn(9, 3), _codes(4, 9)
    table = LaneTable(LANES, HEADS)
    state, count, peak = table.new_state(1)
    trace = torch.full((9, HEADS), torch.nan)
    fold_torch(state, count, peak, z, FoldRows(np.arange(9), code, np.array([0, 9]), np.array([0])), table, trace)
    assert trace[:3].isnan().all()
    for t in range(3, 9):
        want = oracle(z[: t + 1].double().numpy(), code[: t + 1])
        np.testing.assert_allclose(trace[t].numpy(), want, rtol=1e-5, atol=1e-5)


def test_a_lane_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="window of at least 1"):
        Lane(kind="rolling_mean_max", head=0, value=0)
    with pytest.raises(ValueError, match="query column"):
        Lane(kind="attention", head=0, value=0)
    with pytest.raises(ValueError, match="head 1 has lanes of 0 spans"):
        LaneTable([Lane(kind="max", head=0, value=0)], 2)

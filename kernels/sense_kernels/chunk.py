"""The fold of whole chunks on the CPU, in numpy: the closed forms of :mod:`sense_kernels.recurrences`.

Requests of equally many rows are folded together, so that nothing is padded or masked. Time is the innermost axis: a
group has too few lanes to fill a vector register. Numpy's calls cost a third of torch's, and none of them waits for a
second thread.

Shape letters: T packed rows, B requests of equally many rows, n rows of each, L lanes of a group, S state floats of a
lane, w window, C logit columns, G lane groups.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sense_kernels.decode import FloatArray, read_heads
from sense_kernels.lane_table import LaneTable, State
from sense_kernels.lanes import WATCHED, HostGroup, LaneKind
from sense_kernels.rows import FoldRows, IntArray
from sense_kernels.twin import pieces

__all__ = ["fold_chunks"]

_SPREAD = 60.0
"""Queries no further apart than this share one maximum: the least weight is a normal number by a wide margin."""


def fold_chunks(
    state: Tensor,
    count: Tensor,
    peak: Tensor,
    logits_TC: Tensor,
    rows: FoldRows,
    table: LaneTable,
    trace: Tensor | None = None,
    blocks: State | None = None,
) -> None:
    """Fold rows in place; arguments as of :func:`sense_kernels.fold`, all on the CPU."""
    tables = state.numpy(), count.numpy(), peak.numpy()
    with np.errstate(all="ignore"):
        z_CT = np.array(logits_TC.detach().numpy().T, order="C")  # always a copy: it is written to
        if not np.isfinite(np.add.reduce(z_CT, None)):
            z_CT += z_CT * 0.0  # infinity becomes NaN
        for part in pieces(rows):
            state_BS, count_BG = tables[0][part.slot_B], tables[1][part.slot_B]
            for span in table.spans:
                groups = [(index, group) for index, group in enumerate(table.host) if table.host_spans[index] == span]
                for members, row_Bn in _equally_long(part, span):
                    z_CBn = z_CT if _is_run(row_Bn, z_CT.shape[1]) else z_CT[:, row_Bn.ravel()]
                    chunk = z_CBn.reshape(len(z_CBn), *row_Bn.shape)
                    for index, group in groups:
                        lanes = state_BS[members, group.floats].reshape(len(row_Bn), -1, group.width)
                        _UPDATE[group.kind](group, lanes, chunk, count_BG[members, index])
                        state_BS[members, group.floats] = lanes.reshape(len(row_Bn), -1)
                        count_BG[members, index] += row_Bn.shape[1]
            tables[0][part.slot_B], tables[1][part.slot_B] = state_BS, count_BG
            _watch(tables[2], state_BS, count_BG, part, table, trace)
            if blocks is not None and part.block_R is not None:
                block_B = part.block_R[part.start_B[1:] - 1]
                ends_B = block_B >= 0
                for target, source in zip(blocks, tables, strict=True):
                    target.numpy()[block_B[ends_B]] = source[part.slot_B[ends_B]]


def _is_run(row_Bn: IntArray, rows: int) -> bool:
    return row_Bn.size == rows and bool((row_Bn.ravel() == np.arange(rows)).all())


def _equally_long(part: FoldRows, span: int) -> Iterator[tuple[IntArray | slice, IntArray]]:
    """Yield requests with equally many rows of a span, and those rows [B, n]; none without a row."""
    keep_R = (part.code_R & span) != 0
    length_B = np.add.reduceat(keep_R, part.start_B[:-1], dtype=np.int64) if len(keep_R) else part.start_B[:0]
    kept_R = part.row_R if keep_R.all() else part.row_R[keep_R]
    first_B = np.cumsum(length_B) - length_B
    for length in sorted(set(length_B.tolist()) - {0}):
        members = np.flatnonzero(length_B == length)
        if len(members) == len(length_B):
            yield slice(None), kept_R.reshape(-1, length)
        else:
            yield members, kept_R[first_B[members][:, None] + np.arange(length)]


def _watch(
    peak_NH: FloatArray,
    state_BS: FloatArray,
    count_BG: IntArray,
    part: FoldRows,
    table: LaneTable,
    trace: Tensor | None,
) -> None:
    """Take the readout of requests whose part ends in a watched row into the maximum over time."""
    last_B = part.start_B[1:] - 1
    watched_B = np.flatnonzero(part.code_R[last_B] & WATCHED)
    if len(watched_B):
        slots = part.slot_B[watched_B]
        state_BS, count_BG = state_BS[watched_B], count_BG[watched_B]
        readout_BH = read_heads(table, state_BS, count_BG, np.minimum.reduce(count_BG, 0).tolist())
        peak_NH[slots] = np.maximum(peak_NH[slots], readout_BH)
        if trace is not None:
            trace.numpy()[part.row_R[last_B[watched_B]]] = readout_BH


def _mean(group: HostGroup, state_BLS: FloatArray, z_CBn: FloatArray, before_B: IntArray) -> None:
    value_BLn = _lanes(z_CBn, group.value)
    mean_BL = state_BLS[..., 0]
    drift_BL = np.add.reduce(value_BLn - mean_BL[..., None], 2)
    mean_BL += drift_BL / (before_B + value_BLn.shape[2]).astype(np.float32)[:, None]


def _max(group: HostGroup, state_BLS: FloatArray, z_CBn: FloatArray, before_B: IntArray) -> None:
    _take_best(state_BLS[..., 0], _lanes(z_CBn, group.value))


def _ema_max(group: HostGroup, state_BLS: FloatArray, z_CBn: FloatArray, before_B: IntArray) -> None:
    ema_BLn = _lanes(z_CBn, group.value).copy()
    seen_B1n = (before_B[:, None] + np.arange(1, ema_BLn.shape[2] + 1))[:, None].astype(np.float32)
    alpha_BLn = np.maximum(group.param[:, None], np.reciprocal(seen_B1n))
    ema_BLn *= alpha_BLn
    decay_BLn = np.subtract(1.0, alpha_BLn, out=alpha_BLn)
    ema_BLn[..., 0] += decay_BLn[..., 0] * state_BLS[..., 0]
    _affine_scan(decay_BLn, ema_BLn)
    state_BLS[..., 0] = ema_BLn[..., -1]
    _take_best(state_BLS[..., 1], ema_BLn, before_B, group.window)


def _affine_scan(decay_BLn: FloatArray, e_BLn: FloatArray) -> None:
    """Add decay[t] * e[t-1] to each e[t], in place, by recursive doubling: log2(n) passes."""
    stride = 1
    while stride < e_BLn.shape[2]:
        later_BLn = decay_BLn[..., stride:]
        e_BLn[..., stride:] += later_BLn * e_BLn[..., :-stride]
        later_BLn *= decay_BLn[..., :-stride].copy()
        stride *= 2


def _attention(group: HostGroup, state_BLS: FloatArray, z_CBn: FloatArray, before_B: IntArray) -> None:
    top_BL, numerator_BL, denominator_BL = state_BLS[..., 0], state_BLS[..., 1], state_BLS[..., 2]
    value_BLn, weight_BLn = _lanes(z_CBn, group.value), _lanes(z_CBn, group.query) * group.param[:, None]
    new_top_BL = np.maximum(top_BL, np.maximum.reduce(weight_BLn, 2))
    keep_BL = np.exp(top_BL - new_top_BL)
    weight_BLn -= new_top_BL[..., None]
    np.exp(weight_BLn, out=weight_BLn)
    numerator_BL *= keep_BL
    numerator_BL += np.vecdot(weight_BLn, value_BLn)
    denominator_BL *= keep_BL
    denominator_BL += np.add.reduce(weight_BLn, 2)
    top_BL[...] = new_top_BL


def _cusum(group: HostGroup, state_BLS: FloatArray, z_CBn: FloatArray, before_B: IntArray) -> None:
    # The walk less its running minimum, in float64: the walk grows with the prompt while g stays small.
    walk_BLn = (_lanes(z_CBn, group.value) - group.param[:, None]).astype(np.float64)
    walk_BLn[..., 0] += state_BLS[..., 0]
    np.add.accumulate(walk_BLn, 2, out=walk_BLn)
    lowest_BLn = np.minimum.accumulate(walk_BLn, 2)
    np.minimum(lowest_BLn, 0.0, out=lowest_BLn)
    walk_BLn -= lowest_BLn
    state_BLS[..., 0] = walk_BLn[..., -1]
    _take_best(state_BLS[..., 1], walk_BLn)


def _rolling_mean_max(group: HostGroup, state_BLS: FloatArray, z_CBn: FloatArray, before_B: IntArray) -> None:
    past_BLm = _roll(state_BLS[..., :-1], _lanes(z_CBn, group.value), before_B)
    mean_BLn = _window_sum(past_BLm, group.window) * np.float32(1.0 / group.window)
    _take_best(state_BLS[..., -1], mean_BLn, before_B, group.window)


def _rolling_attention(group: HostGroup, state_BLS: FloatArray, z_CBn: FloatArray, before_B: IntArray) -> None:
    window = group.window
    query_BLm = _roll(state_BLS[..., :window], _lanes(z_CBn, group.query) * group.param[:, None], before_B)
    value_BLm = _roll(state_BLS[..., window:-1], _lanes(z_CBn, group.value), before_B)
    _take_best(state_BLS[..., -1], _window_attention(query_BLm, value_BLm, window), before_B, window)


def _lanes(z_CBn: FloatArray, column_L: IntArray) -> FloatArray:
    """Return some columns, [B, L, n]."""
    return z_CBn[column_L].transpose(1, 0, 2)


def _roll(ring_BLw: FloatArray, rows_BLn: FloatArray, before_B: IntArray) -> FloatArray:
    """Write rows into their rings; return the w - 1 tokens before them, then the rows [B, L, w - 1 + n].

    Before the first token stands 0.
    """
    window, rows = ring_BLw.shape[2], rows_BLn.shape[2]
    past_BLm = np.empty((*ring_BLw.shape[:2], window - 1 + rows), np.float32)
    past_BLm[..., window - 1 :] = rows_BLn
    for ring_Lw, past_Lm, before in zip(ring_BLw, past_BLm, before_B.tolist(), strict=True):
        past_Lm[:, : window - 1] = ring_Lw[:, np.arange(before + 1, before + window) % window]
        # Token t has place t mod w.
        end = before + rows
        ring_Lw[:, np.arange(end - window, end) % window] = past_Lm[:, -window:]
    return past_BLm


def _take_best(
    best_BL: FloatArray, readout_BLn: npt.NDArray[np.floating], before_B: IntArray | None = None, window: int = 1
) -> None:
    """Take readouts into the maximum, those at which the window is full."""
    if before_B is not None:
        for readout_Ln, before in zip(readout_BLn, before_B.tolist(), strict=True):
            readout_Ln[:, : max(0, window - 1 - before)] = -np.inf
    np.maximum(best_BL, np.maximum.reduce(readout_BLn, 2), out=best_BL, casting="same_kind")


def _window_sum(run_BLm: FloatArray, window: int) -> FloatArray:
    """Return the sum of each window, [B, L, n + w - 1] -> [B, L, n]: runs of 1, 2, 4 and so on rows, put together."""
    rows, length, covered = run_BLm.shape[2] - window + 1, 1, 0
    total_BLn = np.zeros((*run_BLm.shape[:2], rows), np.float32)
    while covered < window:
        if window & length:
            total_BLn += run_BLm[..., covered : covered + rows]
            covered += length
        run_BLm = run_BLm[..., :-length] + run_BLm[..., length:]
        length *= 2
    return total_BLn


def _window_attention(query_BLm: FloatArray, value_BLm: FloatArray, window: int) -> FloatArray:
    """Return the softmax-weighted mean of each window, [B, L, n].

    Where a lane's queries lie close together, one exponential a token serves every window that holds it.
    """
    top_BL1 = np.maximum.reduce(query_BLm, 2, keepdims=True)
    if (top_BL1[..., 0] - np.minimum.reduce(query_BLm, 2) < _SPREAD).all():
        weight_BLm = query_BLm - top_BL1
        np.exp(weight_BLm, out=weight_BLm)
        mean_BLn = _window_sum(weight_BLm * value_BLm, window)
        mean_BLn /= _window_sum(weight_BLm, window)
        return mean_BLn
    return _apart_attention(query_BLm, value_BLm, window)


def _apart_attention(query_BLm: FloatArray, value_BLm: FloatArray, window: int) -> FloatArray:
    """Do the same with a maximum for each window, one place of the window after another."""
    rows = query_BLm.shape[2] - window + 1
    places = [slice(place, place + rows) for place in range(window)]
    top_BLn = query_BLm[..., places[0]].copy()
    for place in places[1:]:
        np.maximum(top_BLn, query_BLm[..., place], out=top_BLn)
    numerator_BLn, denominator_BLn = np.zeros_like(top_BLn), np.zeros_like(top_BLn)
    for place in places:
        weight_BLn = np.exp(query_BLm[..., place] - top_BLn)
        denominator_BLn += weight_BLn
        numerator_BLn += np.multiply(weight_BLn, value_BLm[..., place], out=weight_BLn)
    numerator_BLn /= denominator_BLn
    return numerator_BLn


_UPDATE: dict[LaneKind, Callable[[HostGroup, FloatArray, FloatArray, IntArray], None]] = {
    "mean": _mean,
    "max": _max,
    "ema_max": _ema_max,
    "attention": _attention,
    "cusum": _cusum,
    "rolling_mean_max": _rolling_mean_max,
    "rolling_attention": _rolling_attention,
}
"""Fold a chunk in place: (group, state [B, L, S], logits [C, B, n], tokens before the chunk [B])."""

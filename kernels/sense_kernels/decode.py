"""The fold of a decode step on the CPU: one row for every request.

A step touches a few kilobytes, so its cost is the number of calls, not the arithmetic: the recurrences are written for
a single token and in numpy, whose calls on small arrays cost a third of torch's. The formulas are those of
:mod:`sense_kernels.recurrences`.

Shape letters: B requests, L lanes of a group, S state floats of a lane, w window, G lane groups, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sense_kernels.lane_table import LaneTable, State
from sense_kernels.lanes import WATCHED, HostGroup, LaneKind
from sense_kernels.rows import FoldRows, IntArray

__all__ = ["FloatArray", "fold_one_row", "read_heads"]

FloatArray = npt.NDArray[np.float32]


def fold_one_row(
    state: Tensor,
    count: Tensor,
    peak: Tensor,
    logits_TC: Tensor,
    rows: FoldRows,
    table: LaneTable,
    trace: Tensor | None = None,
    blocks: State | None = None,
) -> None:
    """Fold one row of every request in place; arguments as of :func:`sense_kernels.fold`, all on the CPU."""
    places = _as_slice(rows.slot_B, len(state))
    tables = state.numpy(), count.numpy(), peak.numpy()
    # Views where the slots follow one another, copies where they do not.
    state_BS, count_BG, peak_BH = (table[places] for table in tables)
    logits_BC = logits_TC.numpy()[_as_slice(rows.row_R, len(logits_TC))]
    trace_BH = None if trace is None else np.full_like(peak_BH, np.nan)
    with np.errstate(all="ignore"):
        z_BC = logits_BC * 0.0 + logits_BC  # infinity becomes NaN
        for code, alike in _alike(rows.code_R):
            step = _Step(table, code, state_BS[alike], count_BG[alike], z_BC[alike])
            step.fold()
            if code & WATCHED:
                readout_BH = read_heads(table, step.state_BS, step.count_BG, step.least_G)
                peak_BH[alike] = np.maximum(peak_BH[alike], readout_BH)
                if trace_BH is not None:
                    trace_BH[alike] = readout_BH
            if alike is not ...:
                state_BS[alike], count_BG[alike] = step.state_BS, step.count_BG
    if not isinstance(places, slice):
        for table_NX, rows_BX in zip(tables, (state_BS, count_BG, peak_BH), strict=True):
            table_NX[places] = rows_BX
    if trace is not None and trace_BH is not None:
        watched_B = (rows.code_R & WATCHED) != 0
        trace.numpy()[rows.row_R[watched_B]] = trace_BH[watched_B]
    if blocks is not None and rows.block_R is not None:
        ends_B = rows.block_R >= 0
        for target, source in zip(blocks, (state_BS, count_BG, peak_BH), strict=True):
            target.numpy()[rows.block_R[ends_B]] = source[ends_B]


def _as_slice(index_B: IntArray, size: int) -> IntArray | slice:
    """Return the slice of ``size`` entries that is the same as an index array, if there is one."""
    index = index_B.tolist()
    run = range(index[0], index[0] + len(index)) if index else range(0)
    return slice(run.start, run.stop) if index == list(run) and run.stop <= size else index_B


def _alike(code_B: IntArray) -> list[tuple[int, Any]]:
    """Return the row codes of the step, each with an index of the requests that have it."""
    codes = code_B.tolist()
    if codes.count(codes[0]) == len(codes):
        return [(codes[0], ...)]
    return [(code, code_B == code) for code in sorted(set(codes))]


@dataclass(slots=True)
class _Step:
    """One token of requests whose rows have the same code, so that a group folds all of them or none."""

    table: LaneTable
    code: int
    state_BS: FloatArray
    count_BG: IntArray
    z_BC: FloatArray
    least_G: list[int] = field(init=False)
    """Fewest tokens that a request of the step has folded, this one included."""

    def fold(self) -> None:
        """Fold the token."""
        taken_G = (self.table.host_spans & self.code) != 0
        self.count_BG += taken_G
        self.least_G = np.minimum.reduce(self.count_BG, 0).tolist()
        inverse_BG = np.reciprocal(self.count_BG.astype(np.float32))
        for index, (group, taken) in enumerate(zip(self.table.host, taken_G.tolist(), strict=True)):
            if taken:
                value_BL = self.z_BC.take(group.value, 1)
                here = slice(index, index + 1)
                seen = _Seen(self.count_BG[:, here], self.least_G[index], inverse_BG[:, here])
                _STEP[group.kind](group, self._lanes(group), value_BL, self.z_BC, seen)

    def _lanes(self, group: HostGroup) -> FloatArray:
        return self.state_BS[:, group.floats].reshape(len(self.state_BS), -1, group.width)


def read_heads(table: LaneTable, state_BS: FloatArray, count_BG: IntArray, least_G: Sequence[int]) -> FloatArray:
    """Return the running value of every head, [B, H]; -inf for a head that has folded no row yet.

    Args:
        table: the lanes.
        state_BS: [B, S].
        count_BG: rows folded by each group.
        least_G: the least of them over the requests.
    """
    # Most readouts are a float of the state as it stands.
    readout_BH = state_BS.take(table.host_floats, 1)
    for index, (group, least) in enumerate(zip(table.host, least_G, strict=True)):
        if least >= group.window and group.kind != "attention" and group.parts == 1 and least:
            continue
        seen_B1 = count_BG[:, index, None]
        lanes = state_BS[:, group.floats].reshape(len(state_BS), -1, group.width)
        lane_BL = _READOUT[group.kind](group, lanes, seen_B1)
        head_BH = lane_BL.reshape(len(lane_BL), -1, group.parts).sum(-1) if group.parts > 1 else lane_BL
        readout_BH[:, group.heads] = head_BH if least else np.where(seen_B1 == 0, np.float32(-np.inf), head_BH)
    return readout_BH


class _Seen(NamedTuple):
    """Tokens folded so far, this one included."""

    count_B1: IntArray
    least: int
    inverse_B1: FloatArray


def _mean(group: HostGroup, state_BLS: FloatArray, value_BL: FloatArray, z_BC: FloatArray, seen: _Seen) -> None:
    mean_BL = state_BLS[..., 0]
    mean_BL += (value_BL - mean_BL) * seen.inverse_B1


def _max(group: HostGroup, state_BLS: FloatArray, value_BL: FloatArray, z_BC: FloatArray, seen: _Seen) -> None:
    np.maximum(state_BLS[..., 0], value_BL, out=state_BLS[..., 0])


def _ema_max(group: HostGroup, state_BLS: FloatArray, value_BL: FloatArray, z_BC: FloatArray, seen: _Seen) -> None:
    ema_BL = state_BLS[..., 0]
    ema_BL += np.maximum(group.param, seen.inverse_B1) * (value_BL - ema_BL)
    _take_best(state_BLS[..., 1], ema_BL, seen, group.window)


def _attention(group: HostGroup, state_BLS: FloatArray, value_BL: FloatArray, z_BC: FloatArray, seen: _Seen) -> None:
    top_BL, numerator_BL, denominator_BL = state_BLS[..., 0], state_BLS[..., 1], state_BLS[..., 2]
    query_BL = z_BC.take(group.query, 1)
    query_BL *= group.param
    new_top_BL = np.maximum(top_BL, query_BL)
    keep_BL = np.exp(top_BL - new_top_BL)
    query_BL -= new_top_BL
    weight_BL = np.exp(query_BL, out=query_BL)
    numerator_BL *= keep_BL
    numerator_BL += weight_BL * value_BL
    denominator_BL *= keep_BL
    denominator_BL += weight_BL
    top_BL[...] = new_top_BL


def _cusum(group: HostGroup, state_BLS: FloatArray, value_BL: FloatArray, z_BC: FloatArray, seen: _Seen) -> None:
    g_BL = state_BLS[..., 0]
    value_BL -= group.param
    g_BL += value_BL
    np.maximum(g_BL, 0.0, out=g_BL)
    np.maximum(state_BLS[..., 1], g_BL, out=state_BLS[..., 1])


def _rolling_mean_max(
    group: HostGroup, state_BLS: FloatArray, value_BL: FloatArray, z_BC: FloatArray, seen: _Seen
) -> None:
    place_B = (seen.count_B1[:, 0] - 1) % group.window
    state_BLS[np.arange(len(place_B)), :, place_B] = value_BL
    mean_BL = np.vecdot(state_BLS[..., :-1], np.full(group.window, 1.0 / group.window, np.float32))
    _take_best(state_BLS[..., -1], mean_BL, seen, group.window)


def _rolling_attention(
    group: HostGroup, state_BLS: FloatArray, value_BL: FloatArray, z_BC: FloatArray, seen: _Seen
) -> None:
    window, place_B = group.window, (seen.count_B1[:, 0] - 1) % group.window
    request_B = np.arange(len(place_B))
    state_BLS[request_B, :, place_B] = z_BC.take(group.query, 1) * group.param
    state_BLS[request_B, :, place_B + window] = value_BL
    _take_best(state_BLS[..., -1], _ring_attention(state_BLS, window), seen, window)


def _take_best(best_BL: FloatArray, readout_BL: FloatArray, seen: _Seen, window: int) -> None:
    """Take a readout into the maximum where the window is full."""
    full = True if seen.least >= window else seen.count_B1 >= window
    np.maximum(best_BL, readout_BL, out=best_BL, where=full)


def _ring_attention(state_BLS: FloatArray, window: int, empty_Bw: npt.NDArray[np.bool_] | None = None) -> FloatArray:
    query_BLw = state_BLS[..., :window]
    if empty_Bw is not None:
        query_BLw = np.where(empty_Bw[:, None], np.float32(-np.inf), query_BLw)
    weight_BLw = query_BLw - np.maximum.reduce(query_BLw, -1, keepdims=True)
    np.exp(weight_BLw, out=weight_BLw)
    weighted_BL: FloatArray = np.vecdot(weight_BLw, state_BLS[..., window : 2 * window])
    weighted_BL /= np.vecdot(weight_BLw, np.ones(window, np.float32))
    return weighted_BL


def _read_first(group: HostGroup, state_BLS: FloatArray, seen_B1: IntArray) -> FloatArray:
    return state_BLS[..., 0]


def _read_last(group: HostGroup, state_BLS: FloatArray, seen_B1: IntArray) -> FloatArray:
    return state_BLS[..., -1]


def _read_attention(group: HostGroup, state_BLS: FloatArray, seen_B1: IntArray) -> FloatArray:
    return state_BLS[..., 1] / state_BLS[..., 2]


def _read_ema_max(group: HostGroup, state_BLS: FloatArray, seen_B1: IntArray) -> FloatArray:
    return np.where(seen_B1 < group.window, state_BLS[..., 0], state_BLS[..., 1])


def _read_rolling_mean(group: HostGroup, state_BLS: FloatArray, seen_B1: IntArray) -> FloatArray:
    warming_BL = state_BLS[..., :-1].sum(-1) / seen_B1.clip(min=1).astype(np.float32)
    return np.where(seen_B1 < group.window, warming_BL, state_BLS[..., -1])


def _read_rolling_attention(group: HostGroup, state_BLS: FloatArray, seen_B1: IntArray) -> FloatArray:
    empty_Bw = np.arange(group.window) >= seen_B1.clip(min=1)
    warming_BL = _ring_attention(state_BLS, group.window, empty_Bw)
    return np.where(seen_B1 < group.window, warming_BL, state_BLS[..., -1])


_STEP: dict[LaneKind, Callable[[HostGroup, FloatArray, FloatArray, FloatArray, _Seen], None]] = {
    "mean": _mean,
    "max": _max,
    "ema_max": _ema_max,
    "attention": _attention,
    "cusum": _cusum,
    "rolling_mean_max": _rolling_mean_max,
    "rolling_attention": _rolling_attention,
}
"""Fold one token in place: (group, state [B, L, S], value [B, L], logits [B, C], tokens so far)."""

_READOUT: dict[LaneKind, Callable[[HostGroup, FloatArray, IntArray], FloatArray]] = {
    "mean": _read_first,
    "max": _read_first,
    "ema_max": _read_ema_max,
    "attention": _read_attention,
    "cusum": _read_last,
    "rolling_mean_max": _read_rolling_mean,
    "rolling_attention": _read_rolling_attention,
}
"""Running value: (group, state [B, L, S], tokens so far [B, 1]) -> [B, L]."""

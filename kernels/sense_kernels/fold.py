"""Fold the logits of a step into the state of each request, in token order.

The fold is sequential per request, so its result depends neither on how a prompt was cut into chunks nor on the other
requests of the batch. ``fold_torch`` is the torch twin; it runs on any device and is vectorised over requests, tokens
and lanes.

Shape letters: T packed rows, R real rows (padding left out), B requests of this step, C logit columns, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sense_kernels.lanes import WATCHED, LaneGroup, LaneTable
from sense_kernels.recurrences import READOUT, UPDATE, Chunk
from sense_kernels.step import STEP

__all__ = ["FoldRows", "fold_torch", "readout_torch"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FoldRows:
    """Which packed rows belong to which slot. Host arrays, sorted by request and then by position.

    A row that is padding, or a draft token that was rejected, is simply not listed.
    """

    row_R: IntArray
    """Index into the packed rows [T]."""
    code_R: IntArray
    """Row code: a sum of PROMPT, TAIL, RESPONSE and WATCHED."""
    start_B: IntArray
    """First entry of each request; B + 1 numbers, the last one is R."""
    slot_B: IntArray
    """State row of each request, all different."""


@torch.inference_mode()
def fold_torch(
    state: Tensor,
    count: Tensor,
    peak: Tensor,
    logits_TC: Tensor,
    rows: FoldRows,
    table: LaneTable,
    trace: Tensor | None = None,
) -> None:
    """Fold rows into ``state``, ``count`` and ``peak`` in place.

    A logit that is NaN or infinite turns every lane that reads it into NaN for the rest of the request: the caller
    compares with ``not (peak < threshold)`` and so fails closed.

    Args:
        state: [N, S] float32.
        count: [N, G] int64, rows folded by each group.
        peak: [N, H] float32, greatest readout at a watched row so far.
        logits_TC: [T, C] float32.
        rows: the rows to fold.
        table: the lanes.
        trace: [T, H] float32 or None; receives the readout at each watched row.
    """
    logits_TC = torch.where(logits_TC.isfinite(), logits_TC, torch.nan)
    for part in _segments(rows):
        slot_B = torch.from_numpy(part.slot_B).to(state.device)
        state_BS, count_BG = state[slot_B], count[slot_B]
        chosen = {span: _choose(logits_TC, part, span, table) for span in table.spans}
        parts = [
            _fold_group(state_BS, count_BG[:, index : index + 1], chosen[group.span], group)
            for index, group in enumerate(table.groups)
        ]
        state_BS = torch.cat(parts, 1)
        count_BG = count_BG + torch.stack([chosen[group.span].length_B for group in table.groups], 1)
        state[slot_B], count[slot_B] = state_BS, count_BG
        _watch(peak, state_BS, count_BG, part, slot_B, table, trace)


def readout_torch(state: Tensor, count: Tensor, slot_B: Tensor, table: LaneTable) -> Tensor:
    """Return the running value of every head, [B, H]; -inf for a head that has folded no row yet."""
    return _readout(state[slot_B], count[slot_B], table)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The rows of a part that a span selects, left-aligned."""

    value_BnL: Tensor
    """Value of every lane of the table."""
    query_BnL: Tensor
    """Query of every lane, multiplied by its factor; without meaning where a lane has none."""
    valid_Bn: Tensor
    length_B: Tensor
    full: bool
    """Whether there is no padding."""


def _choose(logits_TC: Tensor, part: FoldRows, span: int, table: LaneTable) -> _Chosen:
    row_Bn, valid_Bn = _padded(part, span)
    logits_BnC = logits_TC[torch.from_numpy(row_Bn).to(logits_TC.device)]
    valid = torch.from_numpy(valid_Bn).to(logits_TC.device)
    query_BnL = logits_BnC[..., table.query] * table.scale
    return _Chosen(logits_BnC[..., table.value], query_BnL, valid, valid.sum(1), bool(valid_Bn.all()))


def _readout(state_BS: Tensor, count_BG: Tensor, table: LaneTable) -> Tensor:
    lanes = []
    for index, group in enumerate(table.groups):
        state_BLS = state_BS[:, group.offset : group.stop].view(len(state_BS), len(group.param), group.width)
        lanes.append(READOUT[group.kind](group, state_BLS, count_BG[:, index : index + 1]))
    lane_BL = torch.cat(lanes, 1).masked_fill((count_BG == 0)[:, table.group], -torch.inf)
    return torch.zeros(len(state_BS), table.heads, device=state_BS.device).index_add_(1, table.head, lane_BL)


def _fold_group(state_BS: Tensor, count_B1: Tensor, chosen: _Chosen, group: LaneGroup) -> Tensor:
    """Return a group's state [B, L * S] after its rows."""
    old_BLS = state_BS[:, group.offset : group.stop].view(len(state_BS), len(group.param), group.width)
    rows = chosen.valid_Bn.shape[1]
    if not rows:
        return old_BLS.flatten(1)
    value_BnL, query_BnL = chosen.value_BnL[..., group.lanes], chosen.query_BnL[..., group.lanes]
    if rows == 1 and chosen.full:
        return STEP[group.kind](group, old_BLS, value_BnL[:, 0], query_BnL[:, 0], count_B1 + 1).flatten(1)
    new_BLS = UPDATE[group.kind](
        group, old_BLS, Chunk(value_BnL, query_BnL, chosen.valid_Bn, chosen.full, count_B1[:, 0])
    )
    if not chosen.full:
        # A request without a row of this span keeps its state bit for bit.
        new_BLS = torch.where(chosen.valid_Bn[:, :1, None], new_BLS, old_BLS)
    return new_BLS.flatten(1)


def _watch(
    peak: Tensor,
    state_BS: Tensor,
    count_BG: Tensor,
    part: FoldRows,
    slot_B: Tensor,
    table: LaneTable,
    trace: Tensor | None,
) -> None:
    """Take the readout of requests whose part ends in a watched row into the maximum over time."""
    last_B = part.start_B[1:] - 1
    watched_B = (part.code_R[last_B] & WATCHED) != 0
    if not watched_B.any():
        return
    if not watched_B.all():
        keep_B = torch.from_numpy(watched_B).to(slot_B.device)
        slot_B, state_BS, count_BG = slot_B[keep_B], state_BS[keep_B], count_BG[keep_B]
    readout_BH = _readout(state_BS, count_BG, table)
    peak[slot_B] = torch.maximum(peak[slot_B], readout_BH)
    if trace is not None:
        trace[torch.from_numpy(part.row_R[last_B[watched_B]]).to(trace.device)] = readout_BH


def _segments(rows: FoldRows) -> Iterator[FoldRows]:
    """Cut each request after each of its watched rows; part k holds the k-th piece of every request that has one."""
    lengths_B = np.diff(rows.start_B)
    if (lengths_B == 1).all():
        yield rows
        return
    watched_R = (rows.code_R & WATCHED) != 0
    before_R = np.cumsum(watched_R) - watched_R
    first_B = before_R[rows.start_B[:-1].clip(max=max(len(before_R) - 1, 0))] if len(before_R) else lengths_B
    piece_R = before_R - np.repeat(first_B, lengths_B)
    owner_R = np.repeat(np.arange(len(lengths_B)), lengths_B)
    for piece in range(int(piece_R.max(initial=-1)) + 1):
        keep_R = piece_R == piece
        owners, starts = np.unique(owner_R[keep_R], return_index=True)
        yield FoldRows(
            row_R=rows.row_R[keep_R],
            code_R=rows.code_R[keep_R],
            start_B=np.append(starts, keep_R.sum()),
            slot_B=rows.slot_B[owners],
        )


def _padded(part: FoldRows, span: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Return row indices [B, n] and their validity [B, n] of the rows that a span selects, left-aligned."""
    requests = len(part.slot_B)
    keep_R = (part.code_R & span) != 0
    if len(part.row_R) == requests:
        width = int(keep_R.any())
        return part.row_R[:, None][:, :width], keep_R[:, None][:, :width]
    owner = np.repeat(np.arange(requests), np.diff(part.start_B))[keep_R]
    length_B = np.bincount(owner, minlength=requests)
    column = np.arange(len(owner)) - np.repeat(np.cumsum(length_B) - length_B, length_B)
    row_Bn = np.zeros((requests, int(length_B.max(initial=0))), dtype=np.int64)
    valid_Bn = np.zeros(row_Bn.shape, dtype=bool)
    row_Bn[owner, column] = part.row_R[keep_R]
    valid_Bn[owner, column] = True
    return row_Bn, valid_Bn

"""The fold as torch operations, on any device: the twin of the GPU kernel and of the CPU's paths.

Vectorised over requests, tokens and lanes. A request is cut after every row whose readout or state is wanted, so that
each piece is one closed form (:mod:`sense_kernels.recurrences`).

Shape letters: T packed rows, n rows of a piece, B requests of this step, C logit columns, L lanes, S state floats,
G lane groups, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sense_kernels.lane_table import LaneTable, State
from sense_kernels.lanes import WATCHED, LaneGroup
from sense_kernels.recurrences import READOUT, UPDATE, Chunk
from sense_kernels.rows import FoldRows, IntArray

__all__ = ["fold_torch", "pieces", "readout_torch"]


@torch.inference_mode()
def fold_torch(
    state: Tensor,
    count: Tensor,
    peak: Tensor,
    logits_TC: Tensor,
    rows: FoldRows,
    table: LaneTable,
    trace: Tensor | None = None,
    blocks: State | None = None,
) -> None:
    """Fold rows in place; arguments as of :func:`sense_kernels.fold`."""
    logits_TC = logits_TC + logits_TC * 0.0  # infinity becomes NaN
    for part in pieces(rows.committed()):
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
        if blocks is not None and part.block_R is not None:
            _write_blocks(blocks, State(state_BS, count_BG, peak[slot_B]), part.block_R[part.start_B[1:] - 1])


def readout_torch(state: Tensor, count: Tensor, slot_B: Tensor, table: LaneTable) -> Tensor:
    """Return the running value of every head, [B, H]; -inf for a head that has folded no row yet."""
    return _readout(state[slot_B], count[slot_B], table)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The rows of a part that a span selects, left-aligned."""

    value_BnL: Tensor
    """Value of every lane of the table."""
    query_BnL: Tensor
    """Query of every lane; without meaning where a lane has none."""
    valid_Bn: Tensor
    length_B: Tensor
    full: bool
    """Whether there is no padding."""


def _choose(logits_TC: Tensor, part: FoldRows, span: int, table: LaneTable) -> _Chosen:
    row_Bn, valid_Bn = _padded(part, span)
    shape = (*row_Bn.shape, len(table.value))
    logits_RC = logits_TC.index_select(0, torch.from_numpy(row_Bn.ravel()).to(logits_TC.device))
    value_BnL, query_BnL = (logits_RC.index_select(1, column).view(shape) for column in (table.value, table.query))
    valid = torch.from_numpy(valid_Bn).to(logits_TC.device)
    return _Chosen(value_BnL, query_BnL, valid, valid.sum(1), bool(valid_Bn.all()))


def _readout(state_BS: Tensor, count_BG: Tensor, table: LaneTable) -> Tensor:
    readout_BH = torch.empty(len(state_BS), table.heads, device=state_BS.device)
    for index, group in enumerate(table.groups):
        count_B1 = count_BG[:, index : index + 1]
        state_BLS = state_BS[:, group.offset : group.stop].view(len(state_BS), len(group.param), group.width)
        head_BH = READOUT[group.kind](group, state_BLS, count_B1).view(len(state_BS), group.heads, group.parts).sum(-1)
        readout_BH[:, table.head[group.lanes][:: group.parts]] = head_BH.masked_fill(count_B1 == 0, -torch.inf)
    return readout_BH


def _fold_group(state_BS: Tensor, count_B1: Tensor, chosen: _Chosen, group: LaneGroup) -> Tensor:
    """Return a group's state [B, L * S] after its rows."""
    old_BLS = state_BS[:, group.offset : group.stop].view(len(state_BS), len(group.param), group.width)
    rows = chosen.valid_Bn.shape[1]
    if not rows:
        return old_BLS.flatten(1)
    value_BnL, query_BnL = chosen.value_BnL[..., group.lanes], chosen.query_BnL[..., group.lanes]
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


def _write_blocks(blocks: State, state: State, block_B: IntArray) -> None:
    """Copy the state of requests whose last row ends a KV block."""
    keep_B = torch.from_numpy(block_B >= 0).to(blocks.state.device)
    index = torch.from_numpy(block_B[block_B >= 0]).to(blocks.state.device)
    for target, source in zip(blocks, state, strict=True):
        target[index] = source[keep_B]


def pieces(rows: FoldRows) -> Iterator[FoldRows]:
    """Cut each request after its watched rows and block ends; item k holds the k-th piece of all that have one."""
    lengths_B = np.diff(rows.start_B)
    cut_R = (rows.code_R & WATCHED) != 0
    if rows.block_R is not None:
        cut_R |= rows.block_R >= 0
    if lengths_B.all() and np.count_nonzero(cut_R) == np.count_nonzero(cut_R[rows.start_B[1:] - 1]):
        yield rows
        return
    before_R = np.cumsum(cut_R) - cut_R
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
            block_R=None if rows.block_R is None else rows.block_R[keep_R],
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

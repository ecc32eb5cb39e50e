"""Fold the logits of a step into the state of each request, in token order.

The fold is sequential per request, so its result depends neither on how a prompt was cut into chunks nor on the other
requests of the batch. ``fold`` goes to the GPU kernel or to the CPU path, by the device of the state; ``fold_torch`` is
the twin that runs anywhere.

Shape letters: T packed rows, R rows to fold, B requests of this step, C logit columns, H heads, N slots, K KV blocks.
"""

# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sense_kernels._fold_kernel import fold_cells
from sense_kernels._triton import AVAILABLE, tl, triton
from sense_kernels.chunk import fold_chunks
from sense_kernels.decode import fold_one_row
from sense_kernels.lane_table import LaneTable, State
from sense_kernels.launch import fold_launch, options
from sense_kernels.rows import FoldRows, RowTensors
from sense_kernels.score import library
from sense_kernels.twin import fold_torch

__all__ = ["fold", "fold_torch", "fold_triton", "pack_arguments"]

_LENGTHS = 4
"""Requests of so many different lengths are folded length by length on a CPU; with more of them the twin is quicker,
which pads."""


def fold(
    state: Tensor,
    count: Tensor,
    peak: Tensor,
    logits_TC: Tensor,
    rows: FoldRows | RowTensors,
    table: LaneTable,
    trace: Tensor | None = None,
    blocks: State | None = None,
) -> None:
    """Fold rows into ``state``, ``count`` and ``peak`` in place.

    A logit that is NaN or infinite turns every lane that reads it into NaN for the rest of the request: the caller
    compares with ``not (peak < threshold)`` and so fails closed.

    Args:
        state: [N, S] float32.
        count: [N, G] int64, rows folded by each group.
        peak: [N, H] float32, greatest readout at a watched row so far.
        logits_TC: [T, C] float32.
        rows: the rows to fold; :class:`RowTensors` where they already lie on the device.
        table: the lanes.
        trace: [T, H] float32 or None; receives the readout at each watched row.
        blocks: state of the KV blocks; a row with a block number writes its request's state there.
    """
    if isinstance(rows, FoldRows) and not (state.device.type == "cuda" and AVAILABLE):
        run = _fold_cpu if state.device.type == "cpu" else fold_torch
        return run(state, count, peak, logits_TC, rows, table, trace, blocks)
    tensors = rows.to(state.device) if isinstance(rows, FoldRows) else rows
    torch.ops.sense.fold(*pack_arguments(State(state, count, peak), logits_TC, tensors, table, trace, blocks))
    return None


def _check_tables(state: State, logits_TC: Tensor, blocks: State | None, trace: Tensor | None) -> None:
    """Check what the kernel takes for granted.

    Raises:
        ValueError: if a table is not contiguous, or the columns of the logits do not lie next to each other.
    """
    tables = [*state, *(blocks or ()), *(() if trace is None else (trace,))]
    if logits_TC.stride(1) != 1 or not all(table.is_contiguous() for table in tables):
        strides = [table.stride() for table in (logits_TC, *tables)]
        raise ValueError(
            f"logits need columns of stride 1, and state tables and trace must be contiguous, got {strides}"
        )


def _fold_cpu(
    state: Tensor,
    count: Tensor,
    peak: Tensor,
    logits_TC: Tensor,
    rows: FoldRows,
    table: LaneTable,
    trace: Tensor | None = None,
    blocks: State | None = None,
) -> None:
    rows = rows.committed()
    if not len(rows.slot_B):
        return
    alike = len(set(np.diff(rows.start_B).tolist())) <= _LENGTHS
    run = fold_one_row if rows.one_each else fold_chunks if alike else fold_torch
    run(state, count, peak, logits_TC, rows, table, trace, blocks)


@triton.jit(do_not_specialize=["requests", "unit"])
def _fold_kernel(
    tables, logits, stride_logits, rows, lanes, trace, blocks, requests, unit, GROUPS: tl.constexpr, SIZES: tl.constexpr
):
    for index in tl.static_range(len(GROUPS)):
        if tl.program_id(1) == index:
            fold_cells(
                tables,
                logits,
                stride_logits,
                rows,
                lanes,
                trace,
                blocks,
                tl.program_id(0),
                requests,
                unit,
                index,
                tl.constexpr(GROUPS[index]),
                SIZES,
                rows[0] is None,
            )


def fold_triton(
    state: Tensor,
    count: Tensor,
    peak: Tensor,
    logits_TC: Tensor,
    rows: RowTensors,
    table: LaneTable,
    trace: Tensor | None = None,
    blocks: State | None = None,
) -> None:
    """Launch the kernel: one program for a group of lanes and a few requests. Arguments as of :func:`fold`."""
    requests = len(rows.slot)
    if not requests or not table.groups:
        return
    _check_tables(State(state, count, peak), logits_TC, blocks, trace)
    launch = fold_launch(table.spec)
    with torch.cuda.device_of(logits_TC):
        _fold_kernel[-(-requests // launch.requests), len(launch.groups)](
            (state, count, peak),
            logits_TC,
            logits_TC.stride(0),
            (rows.row, rows.code, rows.start, rows.slot, rows.accepted),
            (table.value, table.query, table.param, table.head),
            trace,
            (None, None, None, None) if blocks is None else (rows.block, *blocks),
            requests,
            1,
            GROUPS=launch.groups,
            SIZES=(table.state_floats, len(launch.groups), table.heads),
            **options(launch.warps),
        )


def pack_arguments(
    state: State, logits_TC: Tensor, rows: RowTensors, table: LaneTable, trace: Tensor | None, blocks: State | None
) -> tuple[Any, ...]:
    """Return the arguments in the order of the op's schema: tensors and numbers only."""
    lanes = table.value, table.query, table.param, table.head
    return *state, logits_TC, *rows, *lanes, table.spec, trace, *(blocks or (None, None, None))


def _unpack_arguments(
    arguments: Sequence[Any],
) -> tuple[State, Tensor, RowTensors, LaneTable, Tensor | None, State | None]:
    """Return what :func:`pack_arguments` was given."""
    state, logits_TC, rows = State(*arguments[:3]), arguments[3], RowTensors(*arguments[4:10])
    value, query, param, head, spec = arguments[10:15]
    table = LaneTable.unpack(value, query, param, head, spec, state.peak.shape[1])
    blocks = None if arguments[16] is None else State(*arguments[16:19])
    return state, logits_TC, rows, table, arguments[15], blocks


def _on_cpu(*arguments: Any) -> None:
    state, logits_TC, rows, table, trace, blocks = _unpack_arguments(arguments)
    _fold_cpu(*state, logits_TC, FoldRows.of(rows), table, trace, blocks)


def _on_any(*arguments: Any) -> None:
    state, logits_TC, rows, table, trace, blocks = _unpack_arguments(arguments)
    fold_torch(*state, logits_TC, FoldRows.of(rows), table, trace, blocks)


def _on_gpu(*arguments: Any) -> None:
    state, logits_TC, rows, table, trace, blocks = _unpack_arguments(arguments)
    fold_triton(*state, logits_TC, rows, table, trace, blocks)


library.define(
    "fold(Tensor(a!) state, Tensor(b!) count, Tensor(c!) peak, Tensor logits, Tensor? row, Tensor code, Tensor? start,"
    " Tensor slot, Tensor? accepted, Tensor? block, Tensor value, Tensor query, Tensor param, Tensor head, int[] spec,"
    " Tensor(d!)? trace, Tensor(e!)? block_state, Tensor(f!)? block_count, Tensor(g!)? block_peak) -> ()"
)
library.impl("fold", _on_cpu, "CPU")
library.impl("fold", _on_gpu if AVAILABLE else _on_any, "CUDA")


@torch.library.register_fake("sense::fold", lib=library)
def _fold_fake(*args: object) -> None:
    return None

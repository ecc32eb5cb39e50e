"""Score one site and fold its logits at once.

A decode step (one row for every request) is one launch, with the fold as the epilogue of the product; any other step is
two: the rows of a request lie in several tiles, and their order matters.

Shape letters: T packed rows, D width, C logit columns, B requests, H heads, N slots.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sense_kernels._score_kernel import NO_FOLD, launch_score
from sense_kernels._triton import AVAILABLE
from sense_kernels.fold import (
    FOLD_SCHEMA,
    check_tables,
    fold,
    fold_torch,
    fold_triton,
    on_gpu,
    pack_arguments,
    unpack_arguments,
)
from sense_kernels.lanes import LaneTable, State
from sense_kernels.launch import Scratch, kernel_groups
from sense_kernels.rows import FoldRows, RowTensors
from sense_kernels.score import library, score, score_torch

__all__ = ["score_fold", "score_fold_torch", "score_fold_triton"]

Site = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""weight [D, CP], bias, mlp_weight, mlp_bias, low half of the weight or None; see :func:`sense_kernels.score_torch`."""


def score_fold(
    hidden_TD: Tensor,
    site: Site,
    eps: float,
    state: State,
    rows: FoldRows | RowTensors,
    table: LaneTable,
    logits_TC: Tensor,
    residual: Tensor | None = None,
    trace: Tensor | None = None,
    blocks: State | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Write the logits of a site and fold them into the state of each request, in token order.

    Args:
        hidden_TD: [T, D] any float dtype.
        site: the packed probes; the columns that they write are the columns that ``table`` reads.
        eps: added to the mean square before the root.
        state: streaming state of N slots, updated in place.
        rows: the rows to fold. :class:`RowTensors` without ``row`` and ``start`` is a decode step, row b of request b.
        table: the lanes.
        logits_TC: [R, C] float32, R >= T, written in place.
        residual: [T, D], added to ``hidden_TD`` and rounded to its dtype.
        trace: [T, H] float32 or None; receives the readout at each watched row.
        blocks: state of the KV blocks; a row with a block number writes its request's state there.
        scratch: working memory of the GPU kernel, made anew if it is None.

    Raises:
        ValueError: if a decode step has more or fewer rows than requests.
    """
    if isinstance(rows, FoldRows) and not on_gpu(hidden_TD):
        weight, bias, mlp_weight, mlp_bias, low = site
        score(hidden_TD, weight, bias, mlp_weight, mlp_bias, eps, logits_TC, residual, low)
        return fold(*state, logits_TC, rows, table, trace, blocks)
    tensors = rows.to(hidden_TD.device) if isinstance(rows, FoldRows) else rows
    _check_decode(hidden_TD, tensors)
    torch.ops.sense.score_fold(
        hidden_TD,
        residual,
        *site,
        eps,
        *(scratch or (None, None)),
        *pack_arguments(state, logits_TC, tensors, table, trace, blocks),
    )
    return None


def score_fold_torch(
    hidden_TD: Tensor,
    site: Site,
    eps: float,
    state: State,
    rows: FoldRows,
    table: LaneTable,
    logits_TC: Tensor,
    residual: Tensor | None = None,
    trace: Tensor | None = None,
    blocks: State | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Do what :func:`score_fold` does, in torch, on any device."""
    weight, bias, mlp_weight, mlp_bias, low = site
    score_torch(hidden_TD, weight, bias, mlp_weight, mlp_bias, eps, logits_TC, residual, low)
    fold_torch(*state, logits_TC, rows, table, trace, blocks)


def score_fold_triton(
    hidden_TD: Tensor,
    site: Site,
    eps: float,
    state: State,
    rows: RowTensors,
    table: LaneTable,
    logits_TC: Tensor,
    residual: Tensor | None = None,
    trace: Tensor | None = None,
    blocks: State | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Launch one kernel for a decode step, else two; arguments as of :func:`score_fold`."""
    weight, bias, mlp_weight, mlp_bias, low = site
    decode = rows.row is None
    _check_decode(hidden_TD, rows)
    check_tables(state, logits_TC, blocks, trace)
    epilogue = _epilogue(state, rows, table, trace, blocks) if decode else NO_FOLD
    biases = bias, mlp_weight, mlp_bias
    launch_score(hidden_TD, residual, weight, low, biases, eps, logits_TC, scratch, epilogue)
    if not decode:
        fold_triton(*state, logits_TC, rows, table, trace, blocks)


def _check_decode(hidden_TD: Tensor, rows: RowTensors) -> None:
    count, requests = hidden_TD.numel() // hidden_TD.shape[-1], len(rows.slot)
    if rows.row is None and count != requests:
        raise ValueError(
            f"a decode step has one row for each request, got {count} rows for {requests} requests; "
            "give requests that are not there the slot -1"
        )


def _epilogue(
    state: State, rows: RowTensors, table: LaneTable, trace: Tensor | None, blocks: State | None
) -> dict[str, Any]:
    groups, _ = kernel_groups(table.spec)
    return {
        "tables": tuple(state),
        "fold_rows": (None, rows.code, None, rows.slot, rows.accepted),
        "lanes": (table.value, table.query, table.param, table.head),
        "trace": trace,
        "blocks": (None, None, None, None) if blocks is None else (rows.block, *blocks),
        "GROUPS": groups,
        "SIZES": (table.state_floats, len(groups), table.heads),
    }


library.define(
    "score_fold(Tensor hidden, Tensor? residual, Tensor weight, Tensor bias, Tensor mlp_weight, Tensor mlp_bias,"
    " Tensor? weight_low, float eps, Tensor(x!)? partials, Tensor(y!)? tickets,"
    f" {FOLD_SCHEMA.format(logits='(z!)')}) -> ()"
)


def _op(run: Callable[..., None], host: bool) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        hidden_TD, residual, *site, eps, partials, tickets = arguments[:10]
        state, logits_TC, rows, table, trace, blocks = unpack_arguments(arguments[10:])
        named = FoldRows.of(rows) if host else rows
        scratch = None if partials is None else Scratch(partials, tickets)
        run(hidden_TD, tuple(site), eps, state, named, table, logits_TC, residual, trace, blocks, scratch)

    return call


library.impl("score_fold", _op(score_fold, host=True), "CPU")
library.impl("score_fold", _op(score_fold_triton if AVAILABLE else score_fold_torch, host=not AVAILABLE), "CUDA")


@torch.library.register_fake("sense::score_fold", lib=library)
def _score_fold_fake(*args: object) -> None:
    return None

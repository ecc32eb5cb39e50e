"""Score one site, then fold its logits.

Two ops, on a GPU two launches in a decode step as well: with the fold as an epilogue of the product, one program would
fold all groups of lanes in turn, which takes longer than the second launch (``kernels/README.md``).

Shape letters: T packed rows, D width, C logit columns, B requests, H heads, N slots.
"""

from torch import Tensor

from sense_kernels.fold import fold, fold_torch
from sense_kernels.lane_table import LaneTable, State
from sense_kernels.launch import Scratch
from sense_kernels.rows import FoldRows, RowTensors
from sense_kernels.score import score, score_torch

__all__ = ["Site", "score_fold", "score_fold_torch"]

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
    weight, bias, mlp_weight, mlp_bias, low = site
    count = hidden_TD.numel() // hidden_TD.shape[-1]
    if isinstance(rows, RowTensors) and rows.row is None and count != len(rows.slot):
        raise ValueError(
            f"a decode step has one row for each request, got {count} rows for {len(rows.slot)} requests; "
            "give requests that are not there the slot -1"
        )
    score(hidden_TD, weight, bias, mlp_weight, mlp_bias, eps, logits_TC, residual, low, *(scratch or (None, None)))
    fold(*state, logits_TC, rows, table, trace, blocks)


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

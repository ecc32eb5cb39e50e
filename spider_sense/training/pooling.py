"""Differentiable pooling of whole conversations: what training sees of the aggregators that stream at inference.

Every pool takes the padded logits ``[B, n, K]`` of B left-aligned conversations, query columns first, then values,
and ``valid [B, n]``, with at least one row in each conversation; it returns one logit a conversation, ``[B]``. Padding
enters no pool. On the last row of a conversation mean, attention and rolling_attention equal the aggregator of the
same name; multimax and windows are training forms of aggregators that read the token logits otherwise.

Formulas: attention arXiv 2506.10805, table 1; multimax and rolling_attention arXiv 2601.11516, section 3; windows SWiM,
arXiv 2601.04603.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

__all__ = ["Pool", "attention", "mean", "multimax", "rolling_attention", "windows"]

Pool = Callable[[Tensor, Tensor], Tensor]


def mean(logits_BnK: Tensor, valid_Bn: Tensor) -> Tensor:
    """Return the mean over the rows of the only column."""
    return logits_BnK.squeeze(-1).masked_fill(~valid_Bn, 0.0).sum(1) / valid_Bn.sum(1)


def attention(logits_BnK: Tensor, valid_Bn: Tensor) -> Tensor:
    """Return the sum over the parts of the values' averages, weighted by the softmax of the queries."""
    return _averages(logits_BnK, valid_Bn).sum(-1)


def multimax(logits_BnK: Tensor, valid_Bn: Tensor) -> Tensor:
    """Return the sum over the columns of their averages, each weighted by the softmax of itself at temperature 1.

    The soft form of the maximum, which is read at inference: every token gets a gradient, not the highest alone.
    """
    return _averages(torch.cat((logits_BnK, logits_BnK), -1), valid_Bn).sum(-1)


def rolling_attention(window: int) -> Pool:
    """Return the pool that takes, part by part, the maximum over full windows of attention inside the window.

    A conversation shorter than the window is one window.
    """
    return partial(_rolling_attention, window=window)


def windows(logits_BnK: Tensor, valid_Bn: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the only column over each full window, [B, m], and which of these exist, bool [B, m].

    A conversation shorter than the window has one, the mean over all of its rows.
    """
    window = min(window, valid_Bn.shape[1])
    value_Bn = logits_BnK.squeeze(-1).masked_fill(~valid_Bn, 0.0)
    length_B1 = valid_Bn.sum(1, keepdim=True)
    mean_Bm = value_Bn.unfold(1, window, 1).sum(-1) / length_B1.clamp(max=window)
    exists_Bm = torch.arange(mean_Bm.shape[1], device=mean_Bm.device) <= (length_B1 - window).clamp(min=0)
    return mean_Bm, exists_Bm


def _rolling_attention(logits_BnK: Tensor, valid_Bn: Tensor, window: int) -> Tensor:
    window = min(window, valid_Bn.shape[1])
    query_BmJw, value_BmJw = logits_BnK.unfold(1, window, 1).chunk(2, 2)
    mean_BmJ = (query_BmJw.softmax(-1) * value_BmJw).sum(-1)
    full_Bm = valid_Bn[:, window - 1 :]
    best_BJ = mean_BmJ.masked_fill(~full_Bm[..., None], -torch.inf).amax(1)
    return torch.where(full_Bm[:, :1], best_BJ, _averages(logits_BnK, valid_Bn)).sum(-1)


def _averages(logits_BnK: Tensor, valid_Bn: Tensor) -> Tensor:
    query_BnJ, value_BnJ = logits_BnK.chunk(2, -1)
    weight_BnJ = query_BnJ.masked_fill(~valid_Bn[..., None], -torch.inf).softmax(1)
    return (weight_BnJ * value_BnJ.masked_fill(~valid_Bn[..., None], 0.0)).sum(1)

"""Losses of the gradient-trained families, one number a conversation.

Every loss takes padded logits ``[B, n, K]``, ``valid [B, n]``, targets ``[B]`` (1.0 for a positive) and the weight of
a positive, and returns ``[B]``. All are built on the binary cross-entropy of a logit.

Shape letters: B conversations, n rows, K logit columns, m windows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from spider_sense.training import pooling

__all__ = ["Loss", "pooled", "segment_variance", "swim", "top_k_mean", "topk"]

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

COHERENCE = 0.01
"""Factor on the segment variance (lambda of arXiv 2604.14865)."""
SEGMENT_TEMPERATURE = 2.0
"""Divides a window's logit to give the sigmoid that weighs it in the segment variance (tau_s there)."""


def pooled(pool: pooling.Pool) -> Loss:
    """Return the cross-entropy of the pooled logit."""

    def loss(logits_BnK: Tensor, valid_Bn: Tensor, target_B: Tensor, positive: Tensor) -> Tensor:
        return _cross_entropy(pool(logits_BnK, valid_Bn), target_B, positive)

    return loss


def swim(window: int) -> Loss:
    """Return the softmax-weighted loss over window means (arXiv 2601.04603): sum_t softmax(z)_t BCE(y, z_t).

    No gradient flows through the weights, so they only say which windows count. The paper leaves this open; with a
    gradient through them a benign conversation could lower its loss by raising its calm windows, which draws weight off
    the alarming one.
    """

    def loss(logits_BnK: Tensor, valid_Bn: Tensor, target_B: Tensor, positive: Tensor) -> Tensor:
        mean_Bm, exists_Bm = pooling.windows(logits_BnK, valid_Bn, window)
        weight_Bm = mean_Bm.detach().masked_fill(~exists_Bm, -torch.inf).softmax(1)
        return (weight_Bm * _cross_entropy(mean_Bm, target_B[:, None].expand_as(mean_Bm), positive)).sum(1)

    return loss


def topk(window: int, k: int) -> Loss:
    """Return the loss of arXiv 2604.14865: cross-entropy of the top windows' mean, and coherence of benign ones."""

    def loss(logits_BnK: Tensor, valid_Bn: Tensor, target_B: Tensor, positive: Tensor) -> Tensor:
        mean_Bm, exists_Bm = pooling.windows(logits_BnK, valid_Bn, window)
        fit_B = _cross_entropy(top_k_mean(mean_Bm, exists_Bm, k), target_B, positive)
        return fit_B + COHERENCE * (1 - target_B) * segment_variance(mean_Bm, exists_Bm)

    return loss


def top_k_mean(mean_Bm: Tensor, exists_Bm: Tensor, k: int) -> Tensor:
    """Return the mean of the k highest windows [B], or of all where fewer exist."""
    k = min(k, mean_Bm.shape[1])
    top_Bk = mean_Bm.masked_fill(~exists_Bm, -torch.inf).topk(k, dim=1).values
    count_B1 = exists_Bm.sum(1, keepdim=True).clamp(max=k)
    absent_Bk = torch.arange(k, device=top_Bk.device) >= count_B1
    return top_Bk.masked_fill(absent_Bk, 0.0).sum(1) / count_B1.squeeze(1)


def segment_variance(mean_Bm: Tensor, exists_Bm: Tensor) -> Tensor:
    """Return the variance [B] of the window means, each weighted by its own sigmoid (SegVar of arXiv 2604.14865)."""
    # Proportional to the sigmoid, but by way of its logarithm: the sigmoid itself underflows far below 0.
    weight_Bm = logsigmoid(mean_Bm / SEGMENT_TEMPERATURE).masked_fill(~exists_Bm, -torch.inf).softmax(1)
    center_B1 = (weight_Bm * mean_Bm).sum(1, keepdim=True)
    return (weight_Bm * (mean_Bm - center_B1).square()).sum(1)


def _cross_entropy(logit: Tensor, target: Tensor, positive: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logit, target, pos_weight=positive, reduction="none")

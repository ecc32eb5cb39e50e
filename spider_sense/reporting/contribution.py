"""How much each token contributes to a head's readout.

Shape letters: n tokens, C logit columns of one head, K parts, w window.
"""

import torch
from torch import Tensor

from spider_sense.scoring import Aggregator

__all__ = ["contributions", "meaning"]

_MEANINGS = {
    "attention": "Weight times value: what the token adds to the readout at the end of the conversation",
    "softmax": "Weight times value: what the token adds to the readout at the end of the conversation",
    "rolling_attention": "Weight times value within the window that ends at the token",
}


def meaning(aggregator: Aggregator) -> str:
    """Say in words what :func:`contributions` returns for an aggregator."""
    return _MEANINGS.get(aggregator.kind, "Token logit: what the readout would be if the token stood alone")


def contributions(aggregator: Aggregator, logits_nC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token logits [n] and the contributions [n] of the tokens that a head folds.

    The token logit is the sum of the value columns. For ``attention`` and ``softmax`` the contributions add up to the
    readout after the last token; for ``rolling_attention`` each is the newest token's share of its own window; for the
    other kinds, whose maxima have no shares, it is the token logit.

    Args:
        aggregator: how the head folds.
        logits_nC: its logit columns, queries first, for folded tokens only and in their order.
    """
    value_nK = logits_nC[:, -aggregator.parts :]
    logit_n = value_nK.sum(1)
    if aggregator.kind == "softmax":
        return logit_n, ((value_nK / aggregator.temperature).softmax(0) * value_nK).sum(1)
    if aggregator.kind == "attention":
        return logit_n, (logits_nC[:, : aggregator.parts].softmax(0) * value_nK).sum(1)
    if aggregator.kind == "rolling_attention":
        weight_nK = _newest_weight(logits_nC[:, : aggregator.parts], aggregator.window)
        return logit_n, (weight_nK * value_nK).sum(1)
    return logit_n, logit_n


def _newest_weight(query_nK: Tensor, window: int) -> Tensor:
    """Return each token's softmax weight among the last ``window`` tokens up to and with itself [n, K]."""
    before = query_nK.new_full((window - 1, query_nK.shape[1]), -torch.inf)
    windows_nKw = torch.cat((before, query_nK)).unfold(0, window, 1)
    return windows_nKw.softmax(-1)[..., -1]

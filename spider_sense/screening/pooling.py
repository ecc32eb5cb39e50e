"""The activation of a span: the mean of its tokens' hidden states, each divided by its root mean square.

Shape letters: S tokens of a conversation, D width.
"""

import torch
from torch import Tensor

from spider_sense.screening.span import Span

__all__ = ["pool"]


def pool(hidden_SD: Tensor, span: Span) -> Tensor:
    """Return the mean direction of a span at its end.

    Args:
        hidden_SD: hidden states [S, D] of the whole conversation at one site, any float dtype, any device.
        span: which rows.

    Returns:
        [D] float32 on the CPU; zeros for an empty span, which match nothing.
    """
    rows_nD = hidden_SD[span.start : span.stop].float()
    if not len(rows_nD):
        return torch.zeros(hidden_SD.shape[1])
    rms_n1 = rows_nD.square().mean(1, keepdim=True).sqrt()
    return (rows_nD / rms_n1.clamp(min=torch.finfo(torch.float32).tiny)).mean(0).cpu()

"""The search for the nearest signature, through the kernel.

Shape letters: T queries, N signatures, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sense_kernels import match_signatures
from spider_sense.screening.signature import Signature

__all__ = ["fires", "search"]


def search(units_TD: Tensor, signatures: Sequence[Signature]) -> tuple[Tensor, Tensor]:
    """Find the nearest of N signatures.

    Args:
        units_TD: [T, D] float32.
        signatures: N of them.

    Returns:
        The cosine [T] float32 and the index [T] int64 of the nearest. A query without a direction gets NaN and -1, an
        empty set minus infinity and -1.
    """
    best_T, index_T = torch.empty(len(units_TD)), torch.empty(len(units_TD), dtype=torch.int64)
    vectors_ND = torch.stack([item.vector_D for item in signatures]) if signatures else units_TD[:0]
    match_signatures(units_TD, vectors_ND.bfloat16(), None, best_T, index_T)
    return best_T, index_T


def fires(units_TD: Tensor, signature: Signature) -> Tensor:
    """Return where one signature fires, bool [T]."""
    return search(units_TD, [signature])[0] >= 1 - signature.about.radius

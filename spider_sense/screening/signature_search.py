"""The search for the nearest signature, through the kernel.

Shape letters: T queries, N signatures, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sense_kernels import match_signatures
from spider_sense.screening.signature import Signature

__all__ = ["SignatureSet", "fires"]


class SignatureSet:
    """Signatures laid out for the search.

    Args:
        signatures: N of them.
    """

    def __init__(self, signatures: Sequence[Signature]) -> None:
        self.signatures = tuple(signatures)
        vectors = [item.vector_D for item in signatures]
        self._vectors_ND = torch.stack(vectors).bfloat16() if vectors else None

    def search(self, units_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest signature of each query.

        Args:
            units_TD: [T, D] float32.

        Returns:
            The cosine [T] float32 and the index [T] int64. A query without a direction gets NaN and -1, an empty set
            minus infinity and -1.
        """
        best_T, index_T = torch.empty(len(units_TD)), torch.empty(len(units_TD), dtype=torch.int64)
        vectors_ND = units_TD[:0].bfloat16() if self._vectors_ND is None else self._vectors_ND
        match_signatures(units_TD, vectors_ND, None, best_T, index_T)
        return best_T, index_T


def fires(units_TD: Tensor, signature: Signature) -> Tensor:
    """Return where one signature fires, bool [T]."""
    return SignatureSet([signature]).search(units_TD)[0] >= 1 - signature.about.radius

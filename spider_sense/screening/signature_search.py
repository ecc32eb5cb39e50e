"""The search for signatures, through the kernel: the nearest one, or the one that fires most surely.

Shape letters: T queries, N signatures, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sense_kernels import match_signatures
from spider_sense.screening.signature import Signature

__all__ = ["FiringSet", "SignatureSet", "fires"]


class SignatureSet:
    """Signatures laid out for the search of the nearest.

    Args:
        signatures: N of them.
    """

    def __init__(self, signatures: Sequence[Signature]) -> None:
        self.signatures = tuple(signatures)
        self._rows = torch.stack([self._row(item) for item in signatures]).bfloat16() if signatures else None

    def search(self, units_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest signature of each query.

        Args:
            units_TD: [T, D] float32.

        Returns:
            The cosine [T] float32 and the index [T] int64. A query without a direction gets NaN and -1, an empty set
            minus infinity and -1.
        """
        best_T, index_T = torch.empty(len(units_TD)), torch.empty(len(units_TD), dtype=torch.int64)
        match_signatures(units_TD, units_TD[:0].bfloat16() if self._rows is None else self._rows, None, best_T, index_T)
        return best_T, index_T

    def _row(self, signature: Signature) -> Tensor:
        return signature.vector_D


class FiringSet(SignatureSet):
    """Signatures laid out for the search of the one that fires most surely, each by its own radius.

    The nearest need not be the one that fires: another may be farther and wider. So what is compared is the margin, the
    cosine less the least one at which a signature fires, in one search: two more coordinates, which are -1 in a query,
    hold that least cosine, its rounded part and the rest of it.
    """

    def search(self, units_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Find the signature with the largest margin of each query.

        Args:
            units_TD: [T, D] float32; a query without a direction fires nothing.

        Returns:
            The margin [T] float32, from 0 on if the signature fires, and the index [T] int64. An empty set has minus
            infinity and -1.
        """
        query = torch.nn.functional.pad(units_TD, (0, 2), value=-1.0)
        best_T, index_T = super().search(query)
        return best_T * torch.linalg.vector_norm(query, dim=1), index_T

    def _row(self, signature: Signature) -> Tensor:
        least = torch.tensor(1 - signature.about.radius)
        rounded = least.bfloat16().float()
        return torch.cat([signature.vector_D, torch.stack([rounded, least - rounded])])


def fires(units_TD: Tensor, signature: Signature) -> Tensor:
    """Return where one signature fires, bool [T]."""
    return FiringSet([signature]).search(units_TD)[0] >= 0

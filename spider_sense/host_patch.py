"""The live patch on a CPU, for few rows: numpy, and one product for all projections of a block.

At the batch sizes of decoding calls are what costs, not arithmetic: between two of them the model's weights pass
through the caches, so each call finds its code and its data in memory. Gate and up of a block read the same input,
so the dot products with the vectors of both are taken at once.

Shape letters: T packed rows of a pass, P patched ones, F outputs of a projection, D its inputs, K clusters, R neurons.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from spider_sense.patch import PatchTarget, by_layer
from spider_sense.types import Site

__all__ = ["HostPatch"]

_ROWS = 64
"""Up to so many rows; more of them, as in prefill, are left to the op."""


class HostPatch:
    """Patches float32 outputs in place.

    Args:
        targets: the patch of each projection.
        starts: where the site's rows begin in the projection's output.
        alpha: strength of the patch.
    """

    def __init__(self, targets: Mapping[Site, PatchTarget], starts: Mapping[Site, int], alpha: float) -> None:
        vectors, columns = by_layer(targets, starts)
        self._weight_DK = {layer: alpha * vectors_KD.T.contiguous().numpy() for layer, vectors_KD in vectors.items()}
        self._columns = {site: (neuron_R.numpy(), row_R.numpy()) for site, (neuron_R, row_R) in columns.items()}
        self._held: tuple[int, Tensor, np.ndarray] | None = None
        self._row_P1 = np.empty((0, 1), np.int64)

    def set(self, row_P: np.ndarray) -> None:
        """Take the rows to patch in the next pass, int64."""
        self._row_P1 = row_P[:, None]
        self._held = None

    def suits(self, output_TF: Tensor, hidden_TD: Tensor) -> bool:
        """Whether it can patch the rows of this output."""
        single = output_TF.dtype == hidden_TD.dtype == torch.float32
        return single and output_TF.is_contiguous() and len(self._row_P1) <= _ROWS

    def patch(self, site: Site, output_TF: Tensor, hidden_TD: Tensor) -> None:
        """Patch the output [..., F] of a projection of the input [..., D]."""
        neuron_R, cluster_R = self._columns[site]
        y_TF = _plain(output_TF).reshape(-1, output_TF.shape[-1])
        y_TF[self._row_P1, neuron_R] += self._dots_PK(site.layer, hidden_TD).take(cluster_R, 1)

    def _dots_PK(self, layer: int, hidden_TD: Tensor) -> np.ndarray:
        held = self._held
        # By identity: the tensor is held until the next block's, so no other can have taken its place.
        if held is None or held[0] != layer or held[1] is not hidden_TD:
            x_TD = _plain(hidden_TD).reshape(-1, hidden_TD.shape[-1])
            held = layer, hidden_TD, x_TD.take(self._row_P1[:, 0], 0) @ self._weight_DK[layer]
            self._held = held
        return held[2]


def _plain(tensor: Tensor) -> np.ndarray:
    return (tensor.detach() if tensor.requires_grad else tensor).numpy()

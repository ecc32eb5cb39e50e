"""The live patch on a CPU, outside compiled code, in float32: one product for all projections of a block.

At the batch sizes of decoding calls are what costs, not arithmetic: between two of them the model's weights pass
through the caches, so each call finds its code in memory. Gate and up of a block read the same input, so the dot
products with the vectors of both are taken at once; and they are added by the matrix product that the model's own
layers have just used, although most of what it adds is zero.

Shape letters: T packed rows of a pass, P rows from the first patched one to the last, F features of a site,
D inputs of its projection, K clusters of a layer.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from spider_sense.attach import Patcher
from spider_sense.patch import PatchTarget, by_layer
from spider_sense.sites import ResolvedSite
from spider_sense.types import Site

__all__ = ["HostPatch"]

_ROWS = 64
"""From the first patched row to the last; more of them, as in prefill, are left to the op, which reads only those."""


class HostPatch:
    """Patches outputs in place, off for every row until :meth:`set`.

    Args:
        targets: the patch of each projection.
        places: where each is.
        alpha: strength of the patch.
    """

    def __init__(self, targets: Mapping[Site, PatchTarget], places: Mapping[Site, ResolvedSite], alpha: float) -> None:
        # Columns count from where the site begins.
        vectors, columns = by_layer(targets, dict.fromkeys(targets, 0))
        self._weight_KD = {layer: alpha * vectors_KD for layer, vectors_KD in vectors.items()}
        self._spread_KF = {
            site: _spread(len(vectors[site.layer]), places[site].width, *columns[site]) for site in targets
        }
        self._starts = {site: places[site].start for site in targets}
        self.set(np.empty(0, np.int64))

    def set(self, row_P: np.ndarray) -> None:
        """Take the rows to patch in the next pass, int64, all different."""
        self._on = len(row_P) > 0
        self._first, end = (int(row_P.min()), int(row_P.max()) + 1) if self._on else (0, 0)
        self._rows = end - self._first
        self._few = 0 < self._rows <= _ROWS
        self._off_P1 = _gaps(row_P - self._first, self._rows) if self._few else None
        self._layer, self._input = -1, torch.empty(0)
        self._dots_PK = torch.empty(0, 0)

    def patcher(self, site: Site, otherwise: Patcher) -> Patcher:
        """Return what to call with the output [..., F] and the input [..., D] of a projection.

        Args:
            site: the projection.
            otherwise: what does the same inside compiled code, for many rows, and for other dtypes.
        """
        layer, start, spread_KF = site.layer, self._starts[site], self._spread_KF[site]
        features, single, compiling = spread_KF.shape[1], torch.float32, torch.compiler.is_compiling

        # One function, because a call from Python costs as much as a product.
        def patch(output_TF: Tensor, hidden_TD: Tensor) -> None:
            if compiling():
                otherwise(output_TF, hidden_TD)
            elif self._few and output_TF.dtype is hidden_TD.dtype is single and output_TF.is_contiguous():
                if self._input is not hidden_TD or self._layer != layer:
                    self._dots_PK = self._dots(layer, hidden_TD)
                    # Held until the next block's, so that no other tensor takes its place.
                    self._layer, self._input = layer, hidden_TD
                y_TF = output_TF.detach() if output_TF.requires_grad else output_TF
                whole = y_TF.shape[-1]
                offset = y_TF.storage_offset() + self._first * whole + start
                y_TF.as_strided((self._rows, features), (whole, 1), offset).addmm_(self._dots_PK, spread_KF)
            elif self._on:
                otherwise(output_TF, hidden_TD)

        return patch

    def _dots(self, layer: int, hidden_TD: Tensor) -> Tensor:
        x_TD = hidden_TD.detach() if hidden_TD.requires_grad else hidden_TD
        x_PD = x_TD.reshape(-1, x_TD.shape[-1])[self._first : self._first + self._rows]
        dots_PK = linear(x_PD, self._weight_KD[layer])
        # Adding zero changes nothing but the sign of a zero, and what rests may hold what is no number.
        return dots_PK if self._off_P1 is None else dots_PK.masked_fill_(self._off_P1, 0.0)


def _spread(clusters: int, features: int, neuron_R: Tensor, cluster_R: Tensor) -> Tensor:
    """Return [K, F], one where a neuron has the vector of a cluster and zero elsewhere."""
    spread_KF = torch.zeros(clusters, features)
    spread_KF[cluster_R, neuron_R] = 1.0
    return spread_KF


def _gaps(row_P: np.ndarray, rows: int) -> Tensor | None:
    """Return which of so many rows are not among these, [P, 1] bool; None where all are."""
    if len(row_P) == rows:
        return None
    off_P = np.ones(rows, np.bool_)
    off_P[row_P] = False
    return torch.from_numpy(off_P)[:, None]

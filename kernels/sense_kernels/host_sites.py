"""A few rows at several sites on the CPU: a tap only copies, one batched product at the end of the step does the rest.

At batch sizes of decoding the cost of a site is the number of calls, not their arithmetic.

Shape letters: G sites, T packed rows, D width, CP columns of the stored weights, C columns of all sites together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sense_kernels.score import numpy_rows, score

__all__ = ["HostSites"]


class HostSites:
    """Scores sites without MLP probes, all of one width.

    Args:
        weights: [D, CP] float32 of each site, as :func:`sense_kernels.pack_weight` makes them.
        biases: [columns] float32 of each site.
        eps: added to the mean square before the root.
        rows: up to so many rows are batched; None for as many as numpy is quicker with.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float, rows: int | None = None
    ) -> None:
        self._weights, self._biases, self._eps = tuple(weights), tuple(biases), eps
        sites, width, columns = len(weights), weights[0].shape[0], max(weight.shape[1] for weight in weights)
        self.rows = numpy_rows(width, columns) if rows is None else rows
        self._weight_GDC = np.zeros((sites, width, columns), np.float32)
        self._bias_C = np.empty(sum(map(len, biases)), np.float32)
        self.refresh()
        self._column_C = np.concatenate([columns * i + np.arange(len(bias)) for i, bias in enumerate(biases)])
        self._x_GTD = np.empty((sites, self.rows, width), np.float32)
        self._held: dict[int, int] = {}

    def refresh(self) -> None:
        """Take in weights and biases that were changed in place."""
        for index, weight in enumerate(self._weights):
            self._weight_GDC[index, :, : weight.shape[1]] = weight.numpy()
        np.concatenate([bias.numpy() for bias in self._biases], out=self._bias_C)

    def put(self, site: int, hidden_TD: Tensor) -> None:
        """Copy the hidden states [..., D] of a site, ``rows`` at most."""
        plain = hidden_TD.detach() if hidden_TD.requires_grad else hidden_TD
        x_TD = (plain if plain.dtype == torch.float32 else plain.float()).numpy().reshape(-1, plain.shape[-1])
        self._x_GTD[site, : len(x_TD)] = x_TD
        self._held[site] = len(x_TD)

    def drop(self) -> None:
        """Forget what was put and not scored."""
        self._held.clear()

    def write(self, out: Sequence[Tensor], whole: Tensor) -> None:
        """Write the logits of the sites that were put since the last call, and of no other site.

        Args:
            out: [R, columns] of each site.
            whole: [R, C] of which ``out`` are the columns in turn.
        """
        counts = set(self._held.values())
        if len(self._held) == len(self._weights) and len(counts) == 1:
            self._write_all(counts.pop(), whole)
        else:
            for site, rows in self._held.items():
                x_TD = torch.from_numpy(self._x_GTD[site, :rows])
                empty = x_TD.new_empty(0)
                score(x_TD, self._weights[site], self._biases[site], empty[:, None], empty, self._eps, out[site])
        self._held.clear()

    def _write_all(self, rows: int, whole: Tensor) -> None:
        x_GTD = self._x_GTD[:, :rows]
        with np.errstate(all="ignore"):
            root_GT = np.vecdot(x_GTD, x_GTD)
            root_GT *= np.float32(1 / x_GTD.shape[2])
            root_GT += np.float32(self._eps)
            np.sqrt(root_GT, out=root_GT)
            # A square that overflows would leave the bias alone as a plausible logit; infinity times 0 is NaN.
            root_GT += root_GT * 0.0
            y_GTC = np.matmul(x_GTD, self._weight_GDC)
            y_GTC /= root_GT[..., None]
        y_TC = y_GTC.transpose(1, 0, 2).reshape(rows, -1).take(self._column_C, 1)
        np.add(y_TC, self._bias_C, out=whole.numpy()[:rows])

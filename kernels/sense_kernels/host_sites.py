"""Several sites on the CPU: a tap only copies, and what it copied is scored at the end of the step.

At batch sizes of decoding the cost of a site is the number of calls, not their arithmetic, so a few rows of all sites
are scored by one batched product. The copy is a plain one, which a compiler fuses with the norm that follows the site.

Shape letters: G sites, T packed rows, R rows of the buffer, D width, CP columns of the stored weights, C columns of all
sites together.
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
        dtype: of the hidden states.
        rows: of the largest step that a graph may run.
        few: up to so many rows are batched; None for as many as numpy is quicker with.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        eps: float,
        dtype: torch.dtype = torch.float32,
        rows: int = 0,
        few: int | None = None,
    ) -> None:
        self._weights, self._biases, self._eps, self.dtype = tuple(weights), tuple(biases), eps, dtype
        sites, width, columns = len(weights), weights[0].shape[0], max(weight.shape[1] for weight in weights)
        self.few = numpy_rows(width, columns) if few is None else few
        self.rows = max(rows, self.few)
        self._weight_GDC = np.zeros((sites, width, columns), np.float32)
        self._bias_C = np.empty(sum(map(len, biases)), np.float32)
        self.refresh()
        self._column_C = np.concatenate([columns * i + np.arange(len(bias)) for i, bias in enumerate(biases)])
        # What is never written takes no memory.
        self._held_GRD = torch.empty(sites, self.rows, width, dtype=dtype)
        count_G = torch.zeros(sites, dtype=torch.int64)
        self._held, self._count, self._count_G = list(self._held_GRD), list(count_G), count_G.numpy()
        self._empty = torch.empty(0)

    def refresh(self) -> None:
        """Take in weights and biases that were changed in place."""
        for index, weight in enumerate(self._weights):
            self._weight_GDC[index, :, : weight.shape[1]] = weight.numpy()
        np.concatenate([bias.numpy() for bias in self._biases], out=self._bias_C)

    def put(self, site: int, hidden_TD: Tensor, residual: Tensor | None = None) -> None:
        """Copy the hidden states of a site; may be compiled.

        Args:
            site: its index.
            hidden_TD: [..., D] of ``dtype``, of :attr:`rows` rows at most.
            residual: of the same shape and dtype, to be added; or None.
        """
        whole = hidden_TD if residual is None else hidden_TD + residual
        x_TD = whole.detach().reshape(-1, whole.shape[-1])
        self._held[site][: len(x_TD)] = x_TD
        self._count[site].fill_(len(x_TD))

    def drop(self) -> None:
        """Forget what was put and not scored."""
        self._count_G[:] = 0

    def write(self, out: Sequence[Tensor], whole: Tensor) -> None:
        """Write the logits of the sites that were put since the last call, and of no other site.

        Args:
            out: [R, columns] of each site.
            whole: [R, C] of which ``out`` are the columns in turn.
        """
        counts = self._count_G.tolist()
        if 0 < counts[0] <= self.few and counts.count(counts[0]) == len(counts):
            self._write_all(counts[0], whole)
        else:
            for site, rows in enumerate(counts):
                if rows:
                    x_TD, none = self._held[site][:rows], self._empty
                    score(x_TD, self._weights[site], self._biases[site], none[:, None], none, self._eps, out[site])
        self.drop()

    def _write_all(self, rows: int, whole: Tensor) -> None:
        held_GTD = self._held_GRD[:, :rows]
        x_GTD = (held_GTD if self.dtype == torch.float32 else held_GTD.float()).numpy()
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

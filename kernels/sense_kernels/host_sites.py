"""A few rows at several sites on the CPU: a tap only copies, one batched product at the end of the step does the rest.

At batch sizes of decoding the cost of a site is the number of calls, not their arithmetic.

Shape letters: G sites, T packed rows, R rows of the buffer, D width, CP columns of the stored weights, C columns of all
sites together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sense_kernels.score import library, numpy_rows, score

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
        x_GRD, count_G = torch.empty(sites, self.rows, width), torch.zeros(sites, dtype=torch.int64)
        self._x_GTD, self._count_G = x_GRD.numpy(), count_G.numpy()
        self._empty = torch.empty(0)
        self._held = [(x_GRD[site], count_G[site : site + 1]) for site in range(sites)]

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
        self._count_G[site] = len(x_TD)

    def take(self, site: int, hidden_TD: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """Run the op ``sense::hold``, which a graph may hold: put rows if there are few, score them if there are many.

        Args:
            site: its index.
            hidden_TD: [..., D] any float dtype.
            residual: of the same shape, added as :func:`sense_kernels.score` adds it; or None.
            out: [R, columns] float32, R >= T; the logits of the site, where it is scored.
        """
        held, count = self._held[site]
        torch.ops.sense.hold(
            hidden_TD, residual, held, count, self._weights[site], self._biases[site], self._empty, self._eps, out
        )

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
        if counts[0] and counts.count(counts[0]) == len(counts):
            self._write_all(counts[0], whole)
        else:
            for site, rows in enumerate(counts):
                if rows:
                    x_TD, none = torch.from_numpy(self._x_GTD[site, :rows]), self._empty
                    score(x_TD, self._weights[site], self._biases[site], none[:, None], none, self._eps, out[site])
        self.drop()

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


def _hold(
    hidden_TD: Tensor,
    residual: Tensor | None,
    held_RD: Tensor,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    empty: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    width = hidden_TD.shape[-1]
    rows = hidden_TD.numel() // width
    if rows > len(held_RD):
        return score(hidden_TD, weight, bias, empty[:, None], empty, eps, out, residual)
    whole = hidden_TD if residual is None else hidden_TD + residual
    held_RD[:rows] = whole.reshape(rows, width)
    count.fill_(rows)
    return None


library.define(
    "hold(Tensor hidden, Tensor? residual, Tensor(a!) held, Tensor(b!) count, Tensor weight, Tensor bias, Tensor empty,"
    " float eps, Tensor(c!) out) -> ()"
)
library.impl("hold", _hold, "CPU")


@torch.library.register_fake("sense::hold", lib=library)
def _hold_fake(*args: object) -> None:
    return None

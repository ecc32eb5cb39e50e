"""Add a neuron patch to a projection's output, for chosen rows of the batch.

All patched neurons of a cluster share one vector, so the patch of a weight, ``W[rows_c] += u_c``, costs one dot product
a cluster and token:

    y[t, rows_c] += gate[t] * alpha * (x[t] . u_c)

A row whose gate is 0 is neither read nor written, and stays as it was bit for bit.

Shape letters: T packed rows, D inputs of the projection, F its outputs, K clusters, R patched neurons.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sense_kernels._patch_kernel import launch_dots, launch_update
from sense_kernels._triton import AVAILABLE
from sense_kernels.launch import PatchLaunch, backend, patch_launch
from sense_kernels.score import library

__all__ = [
    "PatchDots",
    "launch_patch_dots",
    "launch_patch_update",
    "patch_rows",
    "patch_rows_torch",
    "patch_rows_triton",
]


def patch_rows_torch(
    output_TF: Tensor,
    hidden_TD: Tensor,
    vectors_KD: Tensor,
    neuron_R: Tensor,
    cluster_R: Tensor,
    gate_T: Tensor,
    alpha: float,
) -> None:
    """Patch the output in place.

    Args:
        output_TF: [..., F] any float dtype, the projection's output; leading dimensions are T rows together.
        hidden_TD: [..., D] its input, of the same rows.
        vectors_KD: [K, D] float32, one vector a cluster.
        neuron_R: [R] int64, columns of the output, all different.
        cluster_R: [R] int64, the cluster of each.
        gate_T: [G] float32 with G >= T, strength of the patch for each row; 0 leaves the row alone.
        alpha: strength of the patch for all rows.
    """
    output, hidden = output_TF.view(-1, output_TF.shape[-1]), hidden_TD.reshape(-1, hidden_TD.shape[-1])
    _check(output, hidden, vectors_KD, gate_T)
    gate_T1 = gate_T[: len(hidden), None]
    added_TR = (gate_T1 * alpha * (hidden.float() @ vectors_KD.T))[:, cluster_R]
    moved_TR = (output[:, neuron_R].float() + added_TR).to(output.dtype)
    output[:, neuron_R] = torch.where(gate_T1 != 0, moved_TR, output[:, neuron_R])


def _patch_cpu(
    output_TF: Tensor,
    hidden_TD: Tensor,
    vectors_KD: Tensor,
    neuron_R: Tensor,
    cluster_R: Tensor,
    gate_T: Tensor,
    alpha: float,
) -> None:
    output, hidden = output_TF.view(-1, output_TF.shape[-1]), hidden_TD.reshape(-1, hidden_TD.shape[-1])
    _check(output, hidden, vectors_KD, gate_T)
    gate_T = gate_T[: len(hidden)]
    row_P = np.flatnonzero(gate_T.numpy())
    if not len(row_P):
        return
    if not output.dtype == hidden.dtype == torch.float32:
        _patch_some(output, hidden, vectors_KD, neuron_R, cluster_R, gate_T, alpha, torch.from_numpy(row_P))
    elif len(row_P) == len(hidden):
        scaled_TK = (hidden @ vectors_KD.T).mul_(gate_T[:, None] * alpha)
        output.scatter_add_(1, neuron_R.expand(len(hidden), -1), scaled_TK.index_select(1, cluster_R))
    else:
        # A few rows, as a rule, on which numpy's calls cost half of torch's.
        scaled_PK = hidden.detach().numpy()[row_P] @ vectors_KD.numpy().T
        scaled_PK *= gate_T.numpy()[row_P, None] * np.float32(alpha)
        output.detach().numpy()[row_P[:, None], neuron_R.numpy()] += scaled_PK.take(cluster_R.numpy(), 1)


def _patch_some(
    output: Tensor,
    hidden: Tensor,
    vectors_KD: Tensor,
    neuron_R: Tensor,
    cluster_R: Tensor,
    gate_T: Tensor,
    alpha: float,
    row_P: Tensor,
) -> None:
    """Patch some rows of any dtype."""
    scaled_PK = (hidden[row_P].float() @ vectors_KD.T).mul_(gate_T[row_P, None] * alpha)
    at = row_P[:, None], neuron_R
    output[at] = (output[at].float() + scaled_PK[:, cluster_R]).to(output.dtype)


def _check(output: Tensor, hidden: Tensor, vectors_KD: Tensor, gate_T: Tensor) -> None:
    rows, width = hidden.shape
    if width != vectors_KD.shape[1] or gate_T.shape[0] < rows or output.shape[0] != rows:
        raise _misfit(hidden, vectors_KD, gate_T, output)


def _misfit(hidden: Tensor, vectors_KD: Tensor, gate_T: Tensor, output: Tensor | None = None) -> ValueError:
    named = "" if output is None else f"output {list(output.shape)}, "
    return ValueError(
        f"{named}hidden states {list(hidden.shape)}, vectors {list(vectors_KD.shape)} and gate {list(gate_T.shape)} do"
        " not fit one another"
    )


def patch_rows_triton(
    output_TF: Tensor,
    hidden_TD: Tensor,
    vectors_KD: Tensor,
    neuron_R: Tensor,
    cluster_R: Tensor,
    gate_T: Tensor,
    alpha: float,
) -> None:
    """Launch the two kernels; arguments as of :func:`patch_rows_torch`."""
    if hidden_TD.numel() and neuron_R.numel():
        dots = launch_patch_dots(hidden_TD, vectors_KD, gate_T)
        launch_patch_update(output_TF, dots, neuron_R, cluster_R, gate_T, alpha)


class PatchDots(NamedTuple):
    """Dot products of rows with vectors, in parts."""

    partials: Tensor  # [segments, T, K] float32, without meaning for rows whose gate is 0
    tile: PatchLaunch


def launch_patch_dots(hidden_TD: Tensor, vectors_KD: Tensor, gate_T: Tensor) -> PatchDots:
    """Launch the first kernel, whose result the projections of one input can share.

    Args:
        hidden_TD: as of :func:`patch_rows_torch`, not empty.
        vectors_KD: those of one projection, or of several one after another.
        gate_T: as of :func:`patch_rows_torch`.
    """
    hidden = hidden_TD.reshape(-1, hidden_TD.shape[-1])
    # Each len of a tensor costs a microsecond.
    if hidden.shape[1] != vectors_KD.shape[1] or gate_T.shape[0] < hidden.shape[0]:
        raise _misfit(hidden, vectors_KD, gate_T)
    tile = patch_launch(hidden.shape[1], backend())
    return PatchDots(launch_dots(hidden, vectors_KD, gate_T.contiguous(), tile), tile)


def launch_patch_update(
    output_TF: Tensor, dots: PatchDots, neuron_R: Tensor, cluster_R: Tensor, gate_T: Tensor, alpha: float
) -> None:
    """Launch the second kernel.

    Args:
        output_TF: as of :func:`patch_rows_torch`.
        dots: of the same rows.
        neuron_R: as of :func:`patch_rows_torch`, not empty.
        cluster_R: the vector of each, as they were handed over for the dot products.
        gate_T: as it was for them.
        alpha: as of :func:`patch_rows_torch`.
    """
    output = output_TF.view(-1, output_TF.shape[-1])
    rows = dots.partials.shape[1]
    if output.stride(1) != 1 or output.shape[0] != rows:
        raise ValueError(
            f"the output needs {rows} rows with columns of stride 1, got {list(output.shape)} with strides"
            f" {output.stride()}"
        )
    launch_update(output, dots.partials, neuron_R, cluster_R, gate_T.contiguous(), alpha, dots.tile)


library.define(
    "patch_rows(Tensor(a!) output, Tensor hidden, Tensor vectors, Tensor neuron, Tensor cluster, Tensor gate,"
    " float alpha) -> ()"
)
library.impl("patch_rows", patch_rows_torch, "CompositeExplicitAutograd")
library.impl("patch_rows", _patch_cpu, "CPU")
if AVAILABLE:
    library.impl("patch_rows", patch_rows_triton, "CUDA")


@torch.library.register_fake("sense::patch_rows", lib=library)
def _patch_rows_fake(*args: object) -> None:
    return None


patch_rows = torch.ops.sense.patch_rows
"""The registered op; same arguments as :func:`patch_rows_torch`."""

"""The patching kernels: the dot products of a row with every cluster's vector, then the update of its neurons.

Segments of the width are multiplied in parallel programs, whatever the number of rows, and added up in order by the
programs that update; a second launch parts the two, so that no program waits for another.

Shape letters: T packed rows, D inputs of the projection, F its outputs, K clusters, R patched neurons, BT, BD, BK, BR
tile sizes.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from sense_kernels._products import dot_single, round_to
from sense_kernels._triton import tl, triton
from sense_kernels.launch import PatchLaunch, options

__all__ = ["launch_dots", "launch_update"]


@triton.jit(do_not_specialize=["rows"])
def dots_kernel(
    partials,
    hidden,
    stride_hidden,
    vectors,
    gate,
    rows,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply one segment of a row tile. Grid: (row tiles, segments).

    Args:
        partials: [segments, T, K] float32, written where a row's gate is open.
        hidden: [T, D], row stride ``stride_hidden``.
        vectors: [K, D] float32.
        gate: [T] float32.
        rows: T.
        SHAPE: (D, K).
        TILE: (BT, BD, segment).
        PRECISION: of the fp32 products.
    """
    D: tl.constexpr = SHAPE[0]
    K: tl.constexpr = SHAPE[1]
    BT: tl.constexpr = TILE[0]
    BD: tl.constexpr = TILE[1]
    SEGMENT: tl.constexpr = TILE[2]
    BK: tl.constexpr = max(16, triton.next_power_of_2(K))
    offs_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    segment = tl.program_id(1)
    patched = (tl.load(gate + offs_t, mask=offs_t < rows, other=0.0) != 0.0)[:, None]
    if tl.max(patched.to(tl.int32)) != 0:
        offs_d, offs_k = tl.arange(0, BD), tl.arange(0, BK)
        in_k = (offs_k < K)[None, :]
        dots = tl.zeros([BT, BK], tl.float32)
        for start in range(0, SEGMENT, BD):
            d = segment * SEGMENT + start + offs_d
            x = tl.load(
                hidden + offs_t[:, None] * stride_hidden + d[None, :], mask=patched & (d < D)[None, :], other=0.0
            )
            in_u = (d < D)[:, None] & in_k
            u = tl.load(vectors + offs_k[None, :] * D + d[:, None], mask=in_u, other=0.0)  # [BD, BK]
            dots = dot_single(x.to(tl.float32), u, dots, PRECISION)
        at = partials + (segment.to(tl.int64) * rows + offs_t)[:, None] * K + offs_k[None, :]
        tl.store(at, dots, mask=patched & in_k)


@triton.jit(do_not_specialize=["rows", "neurons", "alpha"])
def update_kernel(
    output,
    stride_output,
    partials,
    neuron,
    cluster,
    gate,
    alpha,
    rows,
    neurons,
    SEGMENTS: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the segments of a row tile up and update some of its neurons. Grid: (row tiles, neuron tiles).

    Args:
        output: [T, F], row stride ``stride_output``.
        partials: [segments, T, K] float32.
        neuron: [R], columns of the output.
        cluster: [R].
        gate: [T] float32.
        alpha: strength of the patch for all rows.
        rows: T.
        neurons: R.
        SEGMENTS: number of segments.
        K: clusters.
        TILE: (BT, BR).
    """
    BT: tl.constexpr = TILE[0]
    BR: tl.constexpr = TILE[1]
    BK: tl.constexpr = max(16, triton.next_power_of_2(K))
    offs_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    g = tl.load(gate + offs_t, mask=offs_t < rows, other=0.0)
    patched = (g != 0.0)[:, None]
    if tl.max(patched.to(tl.int32)) != 0:
        offs_k, offs_r = tl.arange(0, BK), tl.program_id(1) * BR + tl.arange(0, BR)
        column = tl.load(neuron + offs_r, mask=offs_r < neurons, other=0).to(tl.int64)
        k = tl.load(cluster + offs_r, mask=offs_r < neurons, other=0).to(tl.int32)
        at = output + offs_t[:, None] * stride_output + column[None, :]
        mask = patched & (offs_r < neurons)[None, :]
        y = tl.load(at, mask=mask, other=0.0)
        dots = tl.zeros([BT, BK], tl.float32)
        for segment in tl.static_range(SEGMENTS):
            part = partials + (segment * rows.to(tl.int64) + offs_t)[:, None] * K + offs_k[None, :]
            dots += tl.load(part, mask=patched & (offs_k < K)[None, :], other=0.0)
        dots *= (g * alpha)[:, None]
        added = tl.gather(dots, k[None, :] + tl.zeros([BT, BR], tl.int32), 1)
        tl.store(at, round_to(y.to(tl.float32) + added, y.dtype), mask=mask)


def launch_dots(hidden: Tensor, vectors_KD: Tensor, gate_T: Tensor, tile: PatchLaunch) -> Tensor:
    """Return the dot products [segments, T, K] float32, without meaning for rows whose gate is 0.

    Args:
        hidden: [T, D] any float dtype.
        vectors_KD: [K, D] float32.
        gate_T: [G] float32, contiguous, G >= T.
        tile: settings for the width.
    """
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    rows, (clusters, width) = hidden.shape[0], vectors_KD.shape
    partials = torch.empty(tile.segments, rows, clusters, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        dots_kernel[(-(-rows // tile.rows), tile.segments)](
            partials,
            hidden,
            hidden.stride(0),
            vectors_KD.contiguous(),
            gate_T,
            rows,
            SHAPE=(width, clusters),
            TILE=(tile.rows, tile.inner, tile.segment),
            PRECISION=tile.precision,
            **options(tile.warps, tile.stages),
        )
    return partials


def launch_update(
    output: Tensor,
    partials: Tensor,
    neuron_R: Tensor,
    cluster_R: Tensor,
    gate_T: Tensor,
    alpha: float,
    tile: PatchLaunch,
) -> None:
    """Update the patched neurons of the output [T, F] in place; ``partials`` as of :func:`launch_dots`."""
    (segments, rows, clusters), neurons = partials.shape, neuron_R.shape[0]
    with torch.cuda.device_of(output):
        update_kernel[(-(-rows // tile.rows), -(-neurons // tile.neurons))](
            output,
            output.stride(0),
            partials,
            neuron_R.contiguous(),
            cluster_R.contiguous(),
            gate_T,
            alpha,
            rows,
            neurons,
            SEGMENTS=segments,
            K=clusters,
            TILE=(tile.rows, tile.neurons),
            **options(tile.warps),
        )

"""The scoring kernel: one pass over the hidden states, tensor-core products.

A program owns BT rows and, when there are few rows, one segment of the width; the last of a tile's programs to finish
adds the segments up in order, so that many rows (segments one after another in one program) and few rows (segments side
by side) give the same sum bit for bit. Tickets count the programs that have finished; the last one sets them back.

Shape letters: T packed rows, D width, K linear columns, M hidden units, J their columns, BT, BD, BC tile sizes.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from sense_kernels._fold_token import max_nan
from sense_kernels._products import dot_half, dot_single, round_to
from sense_kernels._ticket import is_last
from sense_kernels._triton import tl, triton
from sense_kernels.launch import Scratch, backend, new_scratch, options, score_launch

__all__ = ["launch_score", "score_kernel"]


@triton.jit
def _segment_product(site, first, offs_t, offs_c, rows, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Multiply one segment of the width: products [BT, BC] and sums of squares [BT]."""
    D: tl.constexpr = SHAPE[0]
    CP: tl.constexpr = SHAPE[1]
    BT: tl.constexpr = TILE[0]
    BD: tl.constexpr = TILE[1]
    BC: tl.constexpr = TILE[2]
    SEGMENT: tl.constexpr = TILE[4]
    PRECISION: tl.constexpr = TILE[7]
    hidden, stride_hidden, residual, stride_residual, weight, weight_low = site
    product = tl.zeros([BT, BC], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    offs_d = tl.arange(0, BD)
    in_t, in_c = (offs_t < rows)[:, None], (offs_c < CP)[None, :]
    for start in range(0, SEGMENT, BD):
        d = first + start + offs_d
        if D % SEGMENT == 0:
            in_x, in_w = in_t, in_c
        else:
            in_x, in_w = in_t & (d < D)[None, :], in_c & (d < D)[:, None]
        x = tl.load(hidden + offs_t[:, None] * stride_hidden + d[None, :], mask=in_x, other=0.0)  # [BT, BD]
        if residual is not None:
            r = tl.load(residual + offs_t[:, None] * stride_residual + d[None, :], mask=in_x, other=0.0)
            x = round_to(x.to(tl.float32) + r.to(tl.float32), x.dtype)
        x32 = x.to(tl.float32)
        squares += tl.sum(x32 * x32, 1)
        at_w = d[:, None] * CP + offs_c[None, :]
        w = tl.load(weight + at_w, mask=in_w, other=0.0)  # [BD, BC]
        if weight_low is not None:
            low = tl.load(weight_low + at_w, mask=in_w, other=0.0)
            product = dot_half(x, w, product)
            product = dot_half(x, low, product)
        else:
            product = dot_single(x32, w, product, PRECISION)
    return product, squares


@triton.jit
def _tile_total(site, scratch, offs_t, offs_c, rows, SHAPE: tl.constexpr, TILE: tl.constexpr):
    """Add the segments of a tile up in order, each from scratch memory or by computing it: [BT, BC] and [BT]."""
    CP: tl.constexpr = SHAPE[1]
    BT: tl.constexpr = TILE[0]
    BC: tl.constexpr = TILE[2]
    SEGMENT: tl.constexpr = TILE[4]
    SEGMENTS: tl.constexpr = TILE[5]
    SPLIT: tl.constexpr = TILE[6]
    total = tl.zeros([BT, BC], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    for segment in range(SEGMENTS):
        if SPLIT:
            partials, scratch_rows, stride = scratch
            at = partials + (segment * scratch_rows + offs_t) * stride
            here = offs_t < rows
            # .cg: the values come from other programs, so a line of the first-level cache may be old.
            total += tl.load(
                at[:, None] + offs_c[None, :],
                mask=here[:, None] & (offs_c < CP)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            squares += tl.load(at + CP, mask=here, other=0.0, cache_modifier=".cg")
        else:
            product, square = _segment_product(site, segment * SEGMENT, offs_t, offs_c, rows, SHAPE, TILE)
            total += product
            squares += square
    return total, squares


@triton.jit
def _finish(
    site, scratch, biases, out, stride_out, rows, offs_t, EPS: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr
):
    """Turn the sums of a row tile into logits and write them."""
    D: tl.constexpr = SHAPE[0]
    C: tl.constexpr = SHAPE[2]
    M: tl.constexpr = SHAPE[3]
    J: tl.constexpr = SHAPE[4]
    K: tl.constexpr = C - M
    BT: tl.constexpr = TILE[0]
    BC: tl.constexpr = TILE[2]
    BJ: tl.constexpr = max(16, triton.next_power_of_2(J))
    PRECISION: tl.constexpr = TILE[7]
    bias, mlp_weight, mlp_bias = biases
    here = (offs_t < rows)[:, None]
    at_out = out + offs_t[:, None] * stride_out
    offs_j = tl.arange(0, BJ)
    second = tl.zeros([BT, BJ], tl.float32)
    for tile in range(TILE[3]):
        offs_c = tile * BC + tl.arange(0, BC)
        total, squares = _tile_total(site, scratch, offs_t, offs_c, rows, SHAPE, TILE)
        mean_square = squares / D + EPS
        # A square that overflows would leave the bias alone as a plausible logit; infinity times 0 is NaN.
        inverse_rms = tl.rsqrt(mean_square) + mean_square * 0.0
        y = total * inverse_rms[:, None] + tl.load(bias + offs_c, mask=offs_c < C, other=0.0)[None, :]
        tl.store(at_out + offs_c[None, :], y, mask=here & (offs_c < K)[None, :])
        if M > 0:
            unit = offs_c - K
            in_v = ((unit >= 0) & (unit < M))[:, None] & (offs_j < J)[None, :]
            v = tl.load(mlp_weight + unit[:, None] * J + offs_j[None, :], mask=in_v, other=0.0)  # [BC, BJ]
            # Other columns meet rows of 0 in v, and NaN times 0 would be NaN.
            y = tl.where(((unit >= 0) & (unit < M))[None, :], max_nan(y, tl.zeros_like(y)), 0.0)
            second = dot_single(y, v, second, PRECISION)
    if M > 0:
        second += tl.load(mlp_bias + offs_j, mask=offs_j < J, other=0.0)[None, :]
        tl.store(at_out + K + offs_j[None, :], second, mask=here & (offs_j < J)[None, :])


@triton.jit(do_not_specialize=["rows"])
def score_kernel(
    site,
    scratch,
    tickets,
    biases,
    out,
    stride_out,
    rows,
    EPS: tl.constexpr,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Score one site. Grid: (row tiles, segments with SPLIT, else 1).

    Args:
        site: (hidden [T, D], row stride, residual [T, D] or None, row stride, weight [D, CP], its low half or None).
        scratch: (partials [segments, scratch rows, stride], scratch rows, stride), used with SPLIT.
        tickets: int32, one for each row tile, 0 on entry and on return.
        biases: (bias [K + M], mlp_weight [M, J], mlp_bias [J]).
        out: [T, K + J] float32, row stride ``stride_out``.
        rows: T.
        EPS: added to the mean square.
        SHAPE: (D, CP, K + M, M, J).
        TILE: (BT, BD, BC, column tiles, segment, segments, SPLIT, precision of fp32 products, whether on HIP).
    """
    BT: tl.constexpr = TILE[0]
    BC: tl.constexpr = TILE[2]
    SPLIT: tl.constexpr = TILE[6]
    offs_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    if SPLIT:
        partials, scratch_rows, stride = scratch
        segment = tl.program_id(1)
        at = partials + (segment * scratch_rows + offs_t) * stride
        here = offs_t < rows
        for tile in range(TILE[3]):
            offs_c = tile * BC + tl.arange(0, BC)
            product, squares = _segment_product(site, segment * TILE[4], offs_t, offs_c, rows, SHAPE, TILE)
            tl.store(at[:, None] + offs_c[None, :], product, mask=here[:, None] & (offs_c < SHAPE[1])[None, :])
            tl.store(at + SHAPE[1], squares, mask=here)
        if is_last(tickets, tl.program_id(0), TILE[5], TILE[8]):
            _finish(site, scratch, biases, out, stride_out, rows, offs_t, EPS, SHAPE, TILE)
    else:
        _finish(site, scratch, biases, out, stride_out, rows, offs_t, EPS, SHAPE, TILE)


def launch_score(
    hidden_TD: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    weight_low: Tensor | None,
    biases: tuple[Tensor, Tensor, Tensor],
    eps: float,
    out: Tensor,
    scratch: Scratch | None,
) -> None:
    """Launch :func:`score_kernel`; arguments as of :func:`sense_kernels.score_torch`."""
    x_TD, r_TD = _packed(hidden_TD), None if residual is None else _packed(residual)
    if weight_low is not None and x_TD.dtype != weight.dtype:
        weight, weight_low = weight.float() + weight_low.float(), None
    rows, width, columns = len(x_TD), x_TD.shape[1], weight.shape[1]
    if not rows:
        return
    if width != len(weight) or rows > len(out) or out.stride(1) != 1 or (r_TD is not None and r_TD.shape != x_TD.shape):
        raise ValueError(
            f"hidden states {list(x_TD.shape)}, residual {None if r_TD is None else list(r_TD.shape)}, weight"
            f" {list(weight.shape)} and out {list(out.shape)} with strides {out.stride()} do not fit one another"
        )
    tile = score_launch(width, columns, weight_low is not None, backend())
    split = tile.segments > 1 and rows <= tile.split_rows
    if split and scratch is None:
        scratch = new_scratch(width, columns, x_TD.device)
    if split and scratch is not None and not scratch.holds(tile, rows, columns):
        raise ValueError(f"scratch {list(scratch.partials.shape)} is too small for {rows} rows and {columns} columns")
    partials, tickets = scratch if scratch is not None and split else (None, None)
    bias, mlp_weight, mlp_bias = biases
    with torch.cuda.device_of(x_TD):
        score_kernel[(-(-rows // tile.rows), tile.segments if split else 1)](
            (x_TD, x_TD.stride(0), r_TD, 0 if r_TD is None else r_TD.stride(0), weight, weight_low),
            (None, 0, 0) if partials is None else (partials, partials.shape[1], partials.shape[2]),
            tickets,
            (bias, mlp_weight, mlp_bias),
            out,
            out.stride(0),
            rows,
            EPS=eps,
            SHAPE=(width, columns, len(bias), len(mlp_weight), len(mlp_bias)),
            TILE=(*tile[:6], split, tile.precision, backend() == "hip"),
            **options(tile.warps, tile.stages),
        )


def _packed(x: Tensor) -> Tensor:
    """Return [..., D] as [T, D] whose rows are contiguous."""
    x_TD = x.detach().reshape(-1, x.shape[-1])
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()

"""Find the nearest of many signatures: the best cosine of each query and its index, without the matrix of cosines.

Signatures are unit vectors, in bf16 or in int8 with one scale each (``signature = int8 * scale``). A query in a wider
dtype is cut into two bf16 halves, so that the products run on tensor cores and keep the query's precision.

Shape letters: T queries, N signatures, D width, BT, BN, BD tile sizes.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
from torch import Tensor

from sense_kernels._products import dot_half, round_to
from sense_kernels._ticket import is_last
from sense_kernels._triton import AVAILABLE, tl, triton
from sense_kernels.launch import backend, match_launch, new_match_scratch, options
from sense_kernels.score import library

__all__ = ["match_signatures", "match_signatures_torch", "match_signatures_triton", "quantise_signatures"]

_CPU_SIGNATURES = 4096
"""Signatures that the CPU path converts at once: a few megabytes, whatever the size of the bank."""


def quantise_signatures(signatures_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return signatures [N, D] as int8 and one scale each, [N] float32."""
    scale_N = signatures_ND.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
    return (signatures_ND.float() / scale_N[:, None]).round().to(torch.int8), scale_N


def match_signatures_torch(
    query_TD: Tensor,
    signatures_ND: Tensor,
    scale_N: Tensor | None,
    best_T: Tensor,
    index_T: Tensor,
    best: Tensor | None = None,
    index: Tensor | None = None,
    tickets: Tensor | None = None,
) -> None:
    """Write the best cosine of each query and the index of its signature, the first one of several.

    A query that is zero or not finite gets NaN and -1, an empty bank minus infinity and -1.

    Args:
        query_TD: [T, D] any float dtype.
        signatures_ND: [N, D] of unit length and finite, bf16, or int8 with ``scale_N``.
        scale_N: [N] float32 for int8 signatures, else None.
        best_T: [T] float32, written in place.
        index_T: [T] int64, written in place.
        best: working memory of the GPU kernel (:class:`sense_kernels.MatchScratch`), made anew if it is None.
        index: likewise.
        tickets: likewise.
    """
    if not len(signatures_ND):
        return _write(query_TD, torch.full_like(best_T, -torch.inf), torch.full_like(index_T, -1), best_T, index_T)
    cosine_TN = query_TD.float() @ signatures_ND.float().T
    if scale_N is not None:
        cosine_TN *= scale_N
    return _write(query_TD, cosine_TN.amax(1), cosine_TN.argmax(1), best_T, index_T)


def _write(query_TD: Tensor, top_T: Tensor, at_T: Tensor, best_T: Tensor, index_T: Tensor) -> None:
    """Divide by the norms and mark queries that have no direction."""
    norm_T = torch.linalg.vector_norm(query_TD.float(), dim=1)
    usable_T = norm_T.isfinite() & (norm_T > 0)
    best_T.copy_(torch.where(usable_T, top_T / norm_T, torch.nan))
    index_T.copy_(torch.where(usable_T, at_T, -1))


def _match_cpu(
    query_TD: Tensor,
    signatures_ND: Tensor,
    scale_N: Tensor | None,
    best_T: Tensor,
    index_T: Tensor,
    best: Tensor | None = None,
    index: Tensor | None = None,
    tickets: Tensor | None = None,
) -> None:
    if len(signatures_ND) <= _CPU_SIGNATURES:
        return match_signatures_torch(query_TD, signatures_ND, scale_N, best_T, index_T)
    query = query_TD.float()
    top_T = torch.full((len(query),), -torch.inf)
    at_T = torch.full((len(query),), -1)
    for start in range(0, len(signatures_ND), _CPU_SIGNATURES):
        part = slice(start, start + _CPU_SIGNATURES)
        cosine_TN = query @ signatures_ND[part].float().T
        if scale_N is not None:
            cosine_TN *= scale_N[part]
        value_T, place_T = cosine_TN.max(1)
        better_T = value_T > top_T
        top_T = torch.where(better_T, value_T, top_T)
        at_T = torch.where(better_T, place_T + start, at_T)
    return _write(query, top_T, at_T, best_T, index_T)


@triton.jit
def _block_cosines(query, stride_query, signatures, offs_t, offs_n, rows, count, D: tl.constexpr, TILE: tl.constexpr):
    """Products [BT, BN] of a tile of queries with a block of signatures."""
    BT: tl.constexpr = TILE[0]
    BN: tl.constexpr = TILE[1]
    BD: tl.constexpr = TILE[2]
    offs_d = tl.arange(0, BD)
    products = tl.zeros([BT, BN], tl.float32)
    for start in range(0, D, BD):
        d = start + offs_d
        in_q, in_s = (offs_t < rows)[:, None], (offs_n < count)[:, None]
        if D % BD != 0:
            in_q, in_s = in_q & (d < D)[None, :], in_s & (d < D)[None, :]
        q = tl.load(query + offs_t[:, None] * stride_query + d[None, :], mask=in_q, other=0.0)  # [BT, BD]
        s = tl.load(signatures + offs_n[:, None] * D + d[None, :], mask=in_s, other=0)  # [BN, BD]
        if s.dtype != tl.bfloat16:
            s = round_to(s.to(tl.float32), tl.bfloat16)  # exact: int8 has 7 bits
        s = tl.trans(s)
        if q.dtype == tl.bfloat16:
            products = dot_half(q, s, products)
        else:
            high = round_to(q.to(tl.float32), tl.bfloat16)
            low = round_to(q.to(tl.float32) - high.to(tl.float32), tl.bfloat16)
            products = dot_half(low, s, dot_half(high, s, products))
    return products


@triton.jit
def _norms(query, stride_query, offs_t, rows, D: tl.constexpr, BD: tl.constexpr):
    """Euclidean norms [BT] of a tile of queries."""
    squares = tl.zeros(offs_t.shape, tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        mask = (offs_t < rows)[:, None] & (d < D)[None, :]
        q = tl.load(query + offs_t[:, None] * stride_query + d[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(q * q, 1)
    return tl.sqrt(squares)


@triton.jit(do_not_specialize=["rows", "count"])
def _match_kernel(
    query,
    stride_query,
    signatures,
    scale,
    best,
    index,
    scratch,
    rows,
    count,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    BT: tl.constexpr = TILE[0]
    BN: tl.constexpr = TILE[1]
    parts_best, parts_index, tickets = scratch
    offs_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    top = tl.full([BT], float("-inf"), tl.float32)
    at = tl.full([BT], -1, tl.int64)
    first = tl.arange(0, BN).to(tl.int64)
    for block in range(part, tl.cdiv(count, BN), parts):
        offs_n = first + block * BN
        cosine = _block_cosines(query, stride_query, signatures, offs_t, offs_n, rows, count, D, TILE)
        if scale is not None:
            cosine *= tl.load(scale + offs_n, mask=offs_n < count, other=0.0)[None, :]
        # Signatures are finite, so a NaN comes from a query without direction, which is marked at the end.
        cosine = tl.where((offs_n < count)[None, :] & (cosine == cosine), cosine, float("-inf"))
        value, place = tl.max(cosine, 1, return_indices=True)
        better = value > top
        top = tl.where(better, value, top)
        at = tl.where(better, place.to(tl.int64) + block * BN, at)
    tl.store(parts_best + part * rows + offs_t, top, mask=offs_t < rows)
    tl.store(parts_index + part * rows + offs_t, at, mask=offs_t < rows)
    if is_last(tickets, tl.program_id(0), parts, TILE[3]):
        top = tl.full([BT], float("-inf"), tl.float32)
        at = tl.full([BT], -1, tl.int64)
        for other in range(parts):
            here = other * rows + offs_t
            value = tl.load(parts_best + here, mask=offs_t < rows, other=float("-inf"), cache_modifier=".cg")
            place = tl.load(parts_index + here, mask=offs_t < rows, other=-1, cache_modifier=".cg")
            # Programs take blocks in turn, so the first of equal cosines may lie in a later part.
            better = (value > top) | ((value == top) & (place < at))
            top, at = tl.where(better, value, top), tl.where(better, place, at)
        norm = _norms(query, stride_query, offs_t, rows, D, TILE[2])
        usable = (norm > 0.0) & (norm < float("inf"))
        tl.store(best + offs_t, tl.where(usable, top / norm, float("nan")), mask=offs_t < rows)
        tl.store(index + offs_t, tl.where(usable, at, -1), mask=offs_t < rows)


def match_signatures_triton(
    query_TD: Tensor,
    signatures_ND: Tensor,
    scale_N: Tensor | None,
    best_T: Tensor,
    index_T: Tensor,
    best: Tensor | None = None,
    index: Tensor | None = None,
    tickets: Tensor | None = None,
) -> None:
    """Launch the kernel; arguments as of :func:`match_signatures_torch`."""
    rows, count = len(query_TD), len(signatures_ND)
    if not rows:
        return
    query = query_TD if query_TD.stride(1) == 1 else query_TD.contiguous()
    launch = match_launch(query.shape[1], query.dtype == torch.bfloat16)
    tiles = -(-rows // launch.rows)
    parts = max(1, min(-(-count // launch.signatures), launch.parts // tiles))
    if best is None or index is None or tickets is None:
        best, index, tickets = new_match_scratch(rows, query.device)
    if min(len(best), len(index)) < parts * rows or len(tickets) < tiles:
        raise ValueError(f"scratch of {len(best)} entries and {len(tickets)} tickets is too small for {rows} queries")
    if not (best_T.is_contiguous() and index_T.is_contiguous()) or signatures_ND.shape[1] != query.shape[1]:
        raise ValueError(
            f"queries {list(query.shape)} and signatures {list(signatures_ND.shape)} do not fit one another, or results"
            f" are not contiguous: strides {best_T.stride()} and {index_T.stride()}"
        )
    with torch.cuda.device_of(query):
        _match_kernel[(tiles, parts)](
            query,
            query.stride(0),
            signatures_ND.contiguous(),
            None if scale_N is None else scale_N.contiguous(),
            best_T,
            index_T,
            (best, index, tickets),
            rows,
            count,
            D=query.shape[1],
            TILE=(launch.rows, launch.signatures, launch.inner, backend() == "hip"),
            **options(launch.warps, launch.stages),
        )


library.define(
    "match_signatures(Tensor query, Tensor signatures, Tensor? scale, Tensor(a!) best_out, Tensor(b!) index_out,"
    " Tensor(c!)? best=None, Tensor(d!)? index=None, Tensor(e!)? tickets=None) -> ()"
)
library.impl("match_signatures", match_signatures_torch, "CompositeExplicitAutograd")
library.impl("match_signatures", _match_cpu, "CPU")
if AVAILABLE:
    library.impl("match_signatures", match_signatures_triton, "CUDA")


@torch.library.register_fake("sense::match_signatures", lib=library)
def _match_signatures_fake(*args: object, **kwargs: object) -> None:
    return None


match_signatures = torch.ops.sense.match_signatures
"""The registered op; same arguments as :func:`match_signatures_torch`."""

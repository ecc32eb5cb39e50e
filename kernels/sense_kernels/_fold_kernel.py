"""The streaming recurrences on the GPU, one token after another, in fp32.

Prompts and decode steps go through the same code, so a request's state is the same bit for bit however its tokens were
cut into steps. A *cell* is one head of one request; a program works on [R, P] lanes (R cells, P lanes a head) and, for
windowed kinds, on [R, P, W] rings, all of one group. Group facts are compile-time constants: a bank's kernel holds one
body per group and each program runs one of them.

A prompt is as quick as one token's chain of dependent instructions. So a token's row number is loaded two steps ahead
and its logits one, and a cell's lanes and rings stay in one thread: along them, places are multiplied by a ``unit``
that the compiler does not know to be 1, or it would spread them over threads to load state in wider pieces.
"""

# mypy: disable-error-code="no-untyped-def"

from sense_kernels._fold_state import ATTENTION, ROLLING_ATTENTION, ROLLING_MEAN_MAX, load_state, store_state
from sense_kernels._fold_token import fold_token, max_nan, read_lanes, window_mean
from sense_kernels._triton import tl, triton
from sense_kernels.lanes import WATCHED

__all__ = ["fold_cells"]

_WATCHED = tl.constexpr(WATCHED)


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, float("nan"))


@triton.jit
def _load_row(rows, block, first, step, length, ONE_ROW: tl.constexpr):
    """Return packed row, code and KV block of a token of every cell, [R] each; past its last row 0, 0 and -1."""
    at, live = first + step, step < length
    row = at
    if not ONE_ROW:
        row = tl.load(rows[0] + at, mask=live, other=0).to(tl.int64)
    code = tl.load(rows[1] + at, mask=live, other=0).to(tl.int32)
    ends = tl.full(code.shape, -1, tl.int64)
    if block is not None:
        ends = tl.load(block + at, mask=live, other=-1).to(tl.int64)
    return row, code, ends


@triton.jit
def _load_logits(logits, stride_logits, row, code, mask, value, query, SPAN: tl.constexpr, KIND: tl.constexpr):
    """Return value and query of a token in every lane [R, P]; 0 where its row is not of the span."""
    taken = ((code & SPAN) != 0)[:, None] & mask
    z = tl.load(logits + row[:, None] * stride_logits + value, mask=taken, other=0.0)
    q = z
    if KIND == ATTENTION or KIND == ROLLING_ATTENTION:
        q = tl.load(logits + row[:, None] * stride_logits + query, mask=taken, other=0.0)
    return z, q


@triton.jit
def fold_cells(
    tables,
    logits,
    stride_logits,
    rows,
    lanes,
    trace,
    blocks,
    program,
    requests,
    unit,
    INDEX: tl.constexpr,
    GROUP: tl.constexpr,
    SIZES: tl.constexpr,
    ONE_ROW: tl.constexpr,
):
    """Fold the rows of a few requests into one group of lanes.

    Args:
        tables: (state [N, S], count [N, G], peak [N, H]).
        logits: [T, C], row stride ``stride_logits``.
        rows: (row [R], code [R], start [B + 1], slot [B], accepted [B] or None); with ``ONE_ROW`` request b is row b.
        lanes: (value, query, param, head), [L] each.
        trace: [T, H] or None.
        blocks: (block [R], state, count, peak of the KV blocks), or None for each.
        program: its place among those of the group, each of which folds cells / padded heads requests.
        requests: B.
        unit: 1, unknown to the compiler.
        INDEX: the group's number.
        GROUP: (kind, span, window, parts, lanes, first lane, first state float, state floats of a lane, cells); cells
            is a power of two and a multiple of the group's padded heads.
        SIZES: (S, G, H).
        ONE_ROW: whether every request has exactly one row.
    """
    KIND: tl.constexpr = GROUP[0]
    SPAN: tl.constexpr = GROUP[1]
    WINDOW: tl.constexpr = GROUP[2]
    PARTS: tl.constexpr = GROUP[3]
    HEADS: tl.constexpr = GROUP[4] // GROUP[3]
    FIRST_LANE: tl.constexpr = GROUP[5]
    FIRST_FLOAT: tl.constexpr = GROUP[6]
    WIDTH: tl.constexpr = GROUP[7]
    BLOCK_HEADS: tl.constexpr = triton.next_power_of_2(HEADS)
    P: tl.constexpr = triton.next_power_of_2(PARTS)
    ROLLING: tl.constexpr = KIND == ROLLING_MEAN_MAX or KIND == ROLLING_ATTENTION
    W: tl.constexpr = triton.next_power_of_2(WINDOW) if ROLLING else 1
    R: tl.constexpr = GROUP[8]
    S: tl.constexpr = SIZES[0]
    G: tl.constexpr = SIZES[1]
    H: tl.constexpr = SIZES[2]

    cell = tl.arange(0, R)
    owner, member = program * (R // BLOCK_HEADS) + cell // BLOCK_HEADS, cell % BLOCK_HEADS
    real = (owner < requests) & (member < HEADS)
    slot = tl.load(rows[3] + owner, mask=real, other=-1).to(tl.int64)
    real = real & (slot >= 0)
    if ONE_ROW:
        first = owner.to(tl.int64)
        length = real.to(tl.int64)
    else:
        first = tl.load(rows[2] + owner, mask=real, other=0).to(tl.int64)
        length = tl.load(rows[2] + owner + 1, mask=real, other=0).to(tl.int64) - first
    if rows[4] is not None:
        length = tl.minimum(length, tl.load(rows[4] + owner, mask=real, other=0).to(tl.int64))
    length = length.to(tl.int32)

    part = tl.arange(0, P)[None, :]
    lane = member[:, None] * PARTS + part * unit
    mask = real[:, None] & (part < PARTS)
    value = tl.load(lanes[0] + FIRST_LANE + lane, mask=mask, other=0)
    query = value
    if KIND == ATTENTION or KIND == ROLLING_ATTENTION:
        query = tl.load(lanes[1] + FIRST_LANE + lane, mask=mask, other=0)
    param = tl.load(lanes[2] + FIRST_LANE + lane, mask=mask, other=1.0)
    head = tl.load(lanes[3] + FIRST_LANE + member * PARTS, mask=real, other=0)

    floats = FIRST_FLOAT + lane * WIDTH
    a, b, c, queries, values = load_state(tables[0], slot[:, None] * S + floats, mask, unit, WINDOW, W, KIND)
    # 64 bits wide in the table only: a request has fewer than 2^31 tokens.
    count = tl.load(tables[1] + slot * G + INDEX, mask=real, other=0).to(tl.int32)
    peak = tl.load(tables[2] + slot * H + head, mask=real, other=0.0)
    # A state that is read before the window is full needs the mean of what the ring holds.
    mean = a
    position = count
    if ROLLING:
        mean = window_mean(queries, values, tl.maximum(count, 1)[:, None] + tl.zeros_like(lane), WINDOW, KIND)
        position = count % WINDOW
    place = tl.arange(0, W)[None, None, :]

    row, code, block = _load_row(rows, blocks[0], first, 0, length, ONE_ROW)
    z, q = _load_logits(logits, stride_logits, row, code, mask, value, query, SPAN, KIND)
    next_row, next_code, next_block = _load_row(rows, blocks[0], first, 1, length, ONE_ROW)
    for step in range(0, tl.max(length)):
        next_z, next_q = _load_logits(logits, stride_logits, next_row, next_code, mask, value, query, SPAN, KIND)
        later_row, later_code, later_block = _load_row(rows, blocks[0], first, step + 2, length, ONE_ROW)

        take = (code & SPAN) != 0
        taken = take[:, None] & mask
        count += take.to(tl.int32)
        seen = tl.maximum(count, 1)[:, None] + tl.zeros_like(lane)
        newest = (place == position[:, None, None]) & taken[:, :, None]
        z, q = _finite(z), _finite(q) * param
        a1, b1, c1, queries, values, mean1 = fold_token(
            a, b, c, queries, values, z, q, param, seen, newest, WINDOW, KIND
        )
        a, b, c = tl.where(taken, a1, a), tl.where(taken, b1, b), tl.where(taken, c1, c)
        mean = tl.where(taken, mean1, mean)
        if ROLLING:
            position = tl.where(take, tl.where(position == WINDOW - 1, 0, position + 1), position)

        watched = (code & _WATCHED) != 0
        readout = tl.sum(tl.where(mask, read_lanes(a, b, c, mean, seen, WINDOW, KIND), 0.0), 1)
        readout = tl.where(count == 0, float("-inf"), readout)
        peak = tl.where(watched, max_nan(peak, readout), peak)
        if trace is not None:
            tl.store(trace + row * H + head, readout, mask=watched)
        if blocks[0] is not None:
            ends = block >= 0
            if tl.max(ends.to(tl.int32)) != 0:
                store_state(
                    blocks[1],
                    block[:, None] * S + floats,
                    mask & ends[:, None],
                    unit,
                    a,
                    b,
                    c,
                    queries,
                    values,
                    WINDOW,
                    KIND,
                )
                tl.store(blocks[2] + block * G + INDEX, count.to(tl.int64), mask=ends & (member == 0))
                tl.store(blocks[3] + block * H + head, peak, mask=ends)
        row, code, block, z, q = next_row, next_code, next_block, next_z, next_q
        next_row, next_code, next_block = later_row, later_code, later_block

    # Warps hold copies of the same cells: none may write before all have read.
    tl.debug_barrier()
    touched = real & (length > 0)
    store_state(
        tables[0], slot[:, None] * S + floats, mask & touched[:, None], unit, a, b, c, queries, values, WINDOW, KIND
    )
    tl.store(tables[1] + slot * G + INDEX, count.to(tl.int64), mask=touched & (member == 0))
    tl.store(tables[2] + slot * H + head, peak, mask=touched)

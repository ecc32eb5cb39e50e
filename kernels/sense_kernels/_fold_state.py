"""Where the fold kernel finds the state of its lanes, and what it leaves there, by kind.

Shape letters: R cells, P lanes of a head, W places of a ring, a power of two.
"""

# mypy: disable-error-code="no-untyped-def"

from sense_kernels._triton import tl, triton
from sense_kernels.lanes import LANE_KINDS

__all__ = [
    "ATTENTION",
    "CUSUM",
    "EMA_MAX",
    "MAX",
    "MEAN",
    "ROLLING_ATTENTION",
    "ROLLING_MEAN_MAX",
    "load_state",
    "store_state",
]

MEAN = tl.constexpr(LANE_KINDS.index("mean"))
MAX = tl.constexpr(LANE_KINDS.index("max"))
EMA_MAX = tl.constexpr(LANE_KINDS.index("ema_max"))
ATTENTION = tl.constexpr(LANE_KINDS.index("attention"))
CUSUM = tl.constexpr(LANE_KINDS.index("cusum"))
ROLLING_MEAN_MAX = tl.constexpr(LANE_KINDS.index("rolling_mean_max"))
ROLLING_ATTENTION = tl.constexpr(LANE_KINDS.index("rolling_attention"))


@triton.jit
def load_state(state, floats, mask, unit, WINDOW: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr):
    """Return (a, b, c) [R, P] and the rings (queries, values) [R, P, W]; what a kind lacks is 0.

    ``floats`` [R, P] is the offset of each lane's first state float.
    """
    zero = tl.zeros(floats.shape, tl.float32)
    a, b, c = zero, zero, zero
    queries = tl.zeros([floats.shape[0], floats.shape[1], W], tl.float32)
    values = queries
    if KIND == ROLLING_MEAN_MAX or KIND == ROLLING_ATTENTION:
        place = tl.arange(0, W)[None, None, :]
        held = mask[:, :, None] & (place < WINDOW)
        first = state + floats[:, :, None] + place * unit
        if KIND == ROLLING_ATTENTION:
            queries = tl.load(first, mask=held, other=0.0)
            values = tl.load(first + WINDOW, mask=held, other=0.0)
            b = tl.load(state + floats + 2 * WINDOW, mask=mask, other=0.0)
        else:
            values = tl.load(first, mask=held, other=0.0)
            b = tl.load(state + floats + WINDOW, mask=mask, other=0.0)
    else:
        a = tl.load(state + floats, mask=mask, other=0.0)
        if KIND == EMA_MAX or KIND == ATTENTION or KIND == CUSUM:
            b = tl.load(state + floats + 1, mask=mask, other=0.0)
        if KIND == ATTENTION:
            c = tl.load(state + floats + 2, mask=mask, other=0.0)
    return a, b, c, queries, values


@triton.jit
def store_state(state, floats, mask, unit, a, b, c, queries, values, WINDOW: tl.constexpr, KIND: tl.constexpr):
    """Write what :func:`load_state` reads."""
    if KIND == ROLLING_MEAN_MAX or KIND == ROLLING_ATTENTION:
        place = tl.arange(0, values.shape[2])[None, None, :]
        held = mask[:, :, None] & (place < WINDOW)
        first = state + floats[:, :, None] + place * unit
        if KIND == ROLLING_ATTENTION:
            tl.store(first, queries, mask=held)
            tl.store(first + WINDOW, values, mask=held)
            tl.store(state + floats + 2 * WINDOW, b, mask=mask)
        else:
            tl.store(first, values, mask=held)
            tl.store(state + floats + WINDOW, b, mask=mask)
    else:
        tl.store(state + floats, a, mask=mask)
        if KIND == EMA_MAX or KIND == ATTENTION or KIND == CUSUM:
            tl.store(state + floats + 1, b, mask=mask)
        if KIND == ATTENTION:
            tl.store(state + floats + 2, c, mask=mask)

"""One token of each streaming recurrence, for a program's lanes at once, in fp32.

The formulas are those of :mod:`sense_kernels.recurrences`, taken one token at a time.

Shape letters: R cells, P lanes of a head, W places of a ring, a power of two.
"""

# mypy: disable-error-code="no-untyped-def"

from sense_kernels._fold_state import ATTENTION, CUSUM, EMA_MAX, MAX, MEAN, ROLLING_MEAN_MAX
from sense_kernels._triton import tl, triton

__all__ = ["fold_token", "max_nan", "read_lanes", "window_mean"]


@triton.jit
def max_nan(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _best(best, readout, full):
    """Take a readout into the maximum once its window is full."""
    return tl.where(full, max_nan(best, readout), best)


@triton.jit
def window_mean(queries, values, seen, WINDOW: tl.constexpr, KIND: tl.constexpr):
    """Mean, or softmax-weighted mean, of the tokens in the ring. [R, P, W] -> [R, P]."""
    place = tl.arange(0, values.shape[2])[None, None, :]
    held = tl.minimum(seen, WINDOW)
    if KIND == ROLLING_MEAN_MAX:
        return tl.sum(values, 2) / held.to(tl.float32)
    filled = place < held[:, :, None]
    top = tl.max(tl.where(filled, queries, float("-inf")), 2)
    weight = tl.where(filled, tl.exp(queries - top[:, :, None]), 0.0)
    return tl.sum(weight * values, 2) / tl.sum(weight, 2)


@triton.jit
def fold_token(a, b, c, queries, values, z, q, param, seen, newest, WINDOW: tl.constexpr, KIND: tl.constexpr):
    """Fold one token into every lane; returns the state and the window's mean.

    ``seen`` counts the token already; ``newest`` [R, P, W] is its place in a ring, no place if it is not taken.
    """
    mean = z
    if KIND == MEAN:
        a += (z - a) / seen.to(tl.float32)
    elif KIND == MAX:
        a = max_nan(a, z)
    elif KIND == EMA_MAX:
        a += tl.maximum(param, 1.0 / seen.to(tl.float32)) * (z - a)
        b = _best(b, a, seen >= WINDOW)
    elif KIND == ATTENTION:
        top = max_nan(a, q)
        keep, weight = tl.exp(a - top), tl.exp(q - top)
        a, b, c = top, b * keep + weight * z, c * keep + weight
    elif KIND == CUSUM:
        a = max_nan(a + (z - param), tl.zeros_like(a))
        b = max_nan(b, a)
    else:
        values = tl.where(newest, z[:, :, None], values)
        queries = tl.where(newest, q[:, :, None], queries)
        mean = window_mean(queries, values, seen, WINDOW, KIND)
        b = _best(b, mean, seen >= WINDOW)
    return a, b, c, queries, values, mean


@triton.jit
def read_lanes(a, b, c, mean, seen, WINDOW: tl.constexpr, KIND: tl.constexpr):
    """Running value of every lane, [R, P]."""
    if KIND == MEAN or KIND == MAX:
        return a
    if KIND == CUSUM:
        return b
    if KIND == ATTENTION:
        return b / c
    if KIND == EMA_MAX:
        return tl.where(seen < WINDOW, a, b)
    return tl.where(seen < WINDOW, mean, b)

"""A bank with a lane of every kind, and the value of its heads over a whole sequence, from the definitions."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sense_kernels import PROMPT, RESPONSE, TAIL, WATCHED, Lane, LaneTable

ALL, WINDOW, COLUMNS, HEADS = PROMPT | RESPONSE, 3, 3, 10
LANES = [
    Lane(kind="mean", head=0, value=0),
    Lane(kind="max", head=1, value=1),
    Lane(kind="ema_max", head=2, value=0, param=0.3, window=4),
    Lane(kind="attention", head=3, value=0, query=1, param=1.5),
    Lane(kind="attention", head=3, value=2, query=2),
    Lane(kind="cusum", head=4, value=2, param=0.2),
    Lane(kind="rolling_mean_max", head=5, value=0, window=WINDOW),
    Lane(kind="rolling_attention", head=6, value=1, query=2, window=WINDOW),
    Lane(kind="mean", head=7, value=2, span=TAIL),
    Lane(kind="rolling_mean_max", head=8, value=1, window=WINDOW, span=RESPONSE),
    Lane(kind="max", head=9, value=0, span=PROMPT),
    Lane(kind="max", head=9, value=1, span=PROMPT),
    Lane(kind="max", head=9, value=2, span=PROMPT),
]


def table() -> LaneTable:
    """Return the table of ``LANES``."""
    return LaneTable(LANES, HEADS)


def values(z: npt.NDArray[np.floating], codes: npt.NDArray[np.int64]) -> list[float]:
    """Return the value of every head after a whole sequence of logits [n, 3]."""

    def column(c: int, span: int = ALL) -> list[float]:
        return [float(x) for x in z[(codes & span) != 0, c]]

    def guarded(x: list[float], f: Callable[[], float]) -> float:
        return f() if x else -math.inf

    z0, z1, z2 = column(0), column(1), column(2)
    tail, reply = column(2, TAIL), column(1, RESPONSE)
    prompt = [column(c, PROMPT) for c in range(COLUMNS)]
    pairs = list(zip(_windows(z2), _windows(z1), strict=True))
    return [
        guarded(z0, lambda: _mean(z0)),
        guarded(z1, lambda: max(z1)),
        guarded(z0, lambda: _ema_max(z0, 0.3, 4)),
        guarded(z0, lambda: _softmax_mean([1.5 * x for x in z1], z0) + _softmax_mean(z2, z2)),
        guarded(z2, lambda: _cusum(z2, 0.2)),
        guarded(z0, lambda: max(_mean(w) for w in _windows(z0))),
        guarded(z1, lambda: max(_softmax_mean(q, v) for q, v in pairs)),
        guarded(tail, lambda: _mean(tail)),
        guarded(reply, lambda: max(_mean(w) for w in _windows(reply))),
        guarded(prompt[0], lambda: sum(max(x) for x in prompt)),
    ]


def greatest_values(z: npt.NDArray[np.floating], codes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the greatest value of every head at a watched row."""
    over_time = [values(z[: t + 1], codes[: t + 1]) for t in np.flatnonzero(codes & WATCHED)]
    greatest: npt.NDArray[np.float64] = np.max(over_time, axis=0, initial=-math.inf)
    return greatest


def _softmax_mean(q: list[float], v: list[float]) -> float:
    top = max(q)
    w = [math.exp(x - top) for x in q]
    return sum(a * b for a, b in zip(w, v, strict=True)) / sum(w)


def _mean(x: list[float]) -> float:
    return sum(x) / len(x)


def _windows(x: list[float]) -> list[list[float]]:
    return [x[i : i + WINDOW] for i in range(len(x) - WINDOW + 1)] or [x]


def _ema_max(x: list[float], alpha: float, warm_up: int) -> float:
    e, best = 0.0, -math.inf
    for t, z in enumerate(x, start=1):
        e += max(alpha, 1 / t) * (z - e)
        if t >= warm_up:
            best = max(best, e)
    return best if len(x) >= warm_up else e


def _cusum(x: list[float], kappa: float) -> float:
    g, best = 0.0, -math.inf
    for z in x:
        g = max(0.0, g + z - kappa)
        best = max(best, g)
    return best

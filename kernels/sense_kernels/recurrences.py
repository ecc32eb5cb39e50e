"""One chunk of each streaming recurrence, in closed form, for a whole group of lanes at once.

Every function takes a :class:`Chunk` (the rows of B requests, left-aligned and padded) and the group's state, and
returns the new state; ``READOUT`` turns a state into the running value. NaN enters no maximum unnoticed: torch's
``amax`` and ``maximum`` propagate it, so that a poisoned lane stays poisoned.

Recurrences: mean and max are folklore; ema_max after Gemini probes (arXiv 2601.11516, section 3), with a warm-up of
1 / alpha tokens instead of a start at 0; attention as in online softmax (arXiv 1805.02867, algorithm 3); cusum after
Page (1954); rolling_mean_max is SWiM's window (arXiv 2601.04603) under a maximum; rolling_attention is arXiv
2601.11516's selected probe.

Shape letters: B requests, n rows of the chunk, L lanes, w window, S state floats of a lane.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sense_kernels.lanes import LaneGroup, LaneKind

__all__ = ["MERGE", "READOUT", "UPDATE", "Chunk"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next rows of B requests."""

    value_BnL: Tensor
    query_BnL: Tensor
    """Attention scores, not yet multiplied by the lane's factor; without meaning for other kinds."""
    valid_Bn: Tensor
    """bool; each row of it is a run of True followed by padding."""
    full: bool
    """Whether there is no padding."""
    count_B: Tensor
    """int64, rows folded before this chunk."""

    def masked(self, x_BnL: Tensor, fill: float) -> Tensor:
        """Return ``x`` with padding rows replaced by ``fill``."""
        return x_BnL if self.full else x_BnL.masked_fill(~self.valid_Bn[..., None], fill)

    @property
    def length_B(self) -> Tensor:
        """Rows of each request in this chunk."""
        return self.valid_Bn.sum(1)


def _mean(group: LaneGroup, state_BLS: Tensor, chunk: Chunk) -> Tensor:
    mean_BL = state_BLS[..., 0]
    total_B1 = (chunk.count_B + chunk.length_B).clamp(min=1)[:, None]
    drift_BL = chunk.masked(chunk.value_BnL - mean_BL[:, None], 0.0).sum(1)
    return (mean_BL + drift_BL / total_B1)[..., None]


def _max(group: LaneGroup, state_BLS: Tensor, chunk: Chunk) -> Tensor:
    return torch.maximum(state_BLS[..., 0], chunk.masked(chunk.value_BnL, -torch.inf).amax(1))[..., None]


def _ema_max(group: LaneGroup, state_BLS: Tensor, chunk: Chunk) -> Tensor:
    # A plain mean until 1 / alpha tokens have been seen: started at a single token, the average would carry that
    # token's noise into its maximum.
    seen_Bn1 = (chunk.count_B[:, None] + torch.arange(1, chunk.valid_Bn.shape[1] + 1, device=state_BLS.device))[
        ..., None
    ]
    alpha_BnL = torch.maximum(group.param, 1.0 / seen_Bn1)
    decay_BnL = chunk.masked(1.0 - alpha_BnL, 1.0)
    ema_BnL = _affine_scan(decay_BnL, chunk.masked(alpha_BnL * chunk.value_BnL, 0.0), state_BLS[..., 0])
    warm_BnL = ema_BnL.masked_fill(~_complete(chunk, group.window), -torch.inf)
    return torch.stack((ema_BnL[:, -1], torch.maximum(state_BLS[..., 1], warm_BnL.amax(1))), -1)


def _affine_scan(decay_BnL: Tensor, input_BnL: Tensor, start_BL: Tensor) -> Tensor:
    """Return e with e[t] = decay[t] * e[t-1] + input[t], by recursive doubling: log2(n) passes."""
    n, stride = decay_BnL.shape[1], 1
    while stride < n:
        input_BnL = torch.cat(
            (
                input_BnL[:, :stride],
                decay_BnL[:, stride:] * input_BnL[:, :-stride] + input_BnL[:, stride:],
            ),
            1,
        )
        decay_BnL = torch.cat((decay_BnL[:, :stride], decay_BnL[:, stride:] * decay_BnL[:, :-stride]), 1)
        stride *= 2
    return decay_BnL * start_BL[:, None] + input_BnL


def _attention(group: LaneGroup, state_BLS: Tensor, chunk: Chunk) -> Tensor:
    top_BL, numerator_BL, denominator_BL = state_BLS.unbind(-1)
    query_BnL = chunk.masked(chunk.query_BnL * group.param, -torch.inf)
    new_top_BL = torch.maximum(top_BL, query_BnL.amax(1))
    keep_BL = torch.exp(top_BL - new_top_BL)
    weight_BnL = torch.exp(query_BnL - new_top_BL[:, None])
    numerator_BL = numerator_BL * keep_BL + (weight_BnL * chunk.masked(chunk.value_BnL, 0.0)).sum(1)
    denominator_BL = denominator_BL * keep_BL + weight_BnL.sum(1)
    return torch.stack((new_top_BL, numerator_BL, denominator_BL), -1)


def _cusum(group: LaneGroup, state_BLS: Tensor, chunk: Chunk) -> Tensor:
    # g[t] = max(0, g[t-1] + z - kappa) is the walk less its running minimum. The walk grows with the prompt while g
    # stays small, so the difference is taken in float64.
    step_BnL = chunk.masked(chunk.value_BnL - group.param, 0.0).double()
    walk_BnL = step_BnL.cumsum(1) + state_BLS[:, None, :, 0]
    g_BnL = (walk_BnL - walk_BnL.cummin(1).values.clamp(max=0.0)).to(state_BLS.dtype)
    best_BL = torch.maximum(state_BLS[..., 1], chunk.masked(g_BnL, -torch.inf).amax(1))
    return torch.stack((g_BnL[:, -1], best_BL), -1)


def _past(ring_BLw: Tensor, rows_BnL: Tensor, count_B: Tensor) -> Tensor:
    """Return the w - 1 tokens before the chunk, then the chunk [B, w - 1 + n, L]; before the first token stands 0."""
    w = ring_BLw.shape[-1]
    age_Bw = (count_B[:, None] + torch.arange(1, w, device=ring_BLw.device)) % w
    history_BLw = ring_BLw.gather(2, age_Bw[:, None].expand(-1, ring_BLw.shape[1], -1))
    return torch.cat((history_BLw.transpose(1, 2), rows_BnL), 1)


def _write_ring(ring_BLw: Tensor, rows_BnL: Tensor, chunk: Chunk) -> Tensor:
    """Return the ring after the chunk: token t sits at index t mod w."""
    w = ring_BLw.shape[-1]
    length_B1 = chunk.length_B[:, None]
    last_B1 = chunk.count_B[:, None] + length_B1 - 1
    source_Bw = length_B1 - 1 - (last_B1 - torch.arange(w, device=ring_BLw.device)) % w
    index_BwL = source_Bw.clamp(min=0)[..., None].expand(-1, -1, rows_BnL.shape[2])
    fresh_BLw = rows_BnL.gather(1, index_BwL).transpose(1, 2)
    return torch.where((source_Bw >= 0)[:, None], fresh_BLw, ring_BLw)


def _complete(chunk: Chunk, window: int) -> Tensor:
    """Return which rows of the chunk have at least ``window`` tokens up to and with themselves [B, n, 1]."""
    seen_Bn = chunk.count_B[:, None] + torch.arange(1, chunk.valid_Bn.shape[1] + 1, device=chunk.valid_Bn.device)
    return (chunk.valid_Bn & (seen_Bn >= window))[..., None]


def _rolling_mean_max(group: LaneGroup, state_BLS: Tensor, chunk: Chunk) -> Tensor:
    ring_BLw, rows_BnL = state_BLS[..., :-1], chunk.masked(chunk.value_BnL, 0.0)
    mean_BnL = _past(ring_BLw, rows_BnL, chunk.count_B).unfold(1, group.window, 1).mean(-1)
    mean_BnL = mean_BnL.masked_fill(~_complete(chunk, group.window), -torch.inf)
    best_BL = torch.maximum(state_BLS[..., -1], mean_BnL.amax(1))
    return torch.cat((_write_ring(ring_BLw, rows_BnL, chunk), best_BL[..., None]), -1)


def _rolling_attention(group: LaneGroup, state_BLS: Tensor, chunk: Chunk) -> Tensor:
    # Both rings roll as one, queries as the first half of the lanes.
    rings_BLw = torch.cat(state_BLS[..., :-1].chunk(2, -1), 1)
    rows_BnL = chunk.masked(torch.cat((chunk.query_BnL * group.param, chunk.value_BnL), 2), 0.0)
    mean_BnL = _window_attention(_past(rings_BLw, rows_BnL, chunk.count_B), group.window)
    mean_BnL = mean_BnL.masked_fill(~_complete(chunk, group.window), -torch.inf)
    best_BL = torch.maximum(state_BLS[..., -1], mean_BnL.amax(1))
    rings_BLw = _write_ring(rings_BLw, rows_BnL, chunk)
    return torch.cat((*rings_BLw.chunk(2, 1), best_BL[..., None]), -1)


def _window_attention(past_BmL: Tensor, window: int) -> Tensor:
    """Return the softmax-weighted mean of each window: [B, n + w - 1, 2 L] queries and values -> [B, n, L].

    One shift of the window after another, so that the long axes stay the inner ones.
    """
    rows = past_BmL.shape[1] - window + 1
    query_BmL, value_BmL = past_BmL.chunk(2, 2)
    shifted = [query_BmL[:, shift : shift + rows] for shift in range(window)]
    top_BnL = shifted[0].clone()
    for query_BnL in shifted[1:]:
        torch.maximum(top_BnL, query_BnL, out=top_BnL)
    numerator_BnL, denominator_BnL = torch.zeros_like(top_BnL), torch.zeros_like(top_BnL)
    for shift, query_BnL in enumerate(shifted):
        weight_BnL = (query_BnL - top_BnL).exp_()
        denominator_BnL += weight_BnL
        numerator_BnL.addcmul_(weight_BnL, value_BmL[:, shift : shift + rows])
    return numerator_BnL.div_(denominator_BnL)


UPDATE: dict[LaneKind, Callable[[LaneGroup, Tensor, Chunk], Tensor]] = {
    "mean": _mean,
    "max": _max,
    "ema_max": _ema_max,
    "attention": _attention,
    "cusum": _cusum,
    "rolling_mean_max": _rolling_mean_max,
    "rolling_attention": _rolling_attention,
}
"""Fold a chunk: (group, state [B, L, S], chunk) -> new state."""


def _filled(count_B1: Tensor, window: int) -> Tensor:
    """Return which ring slots hold a token [B, 1, w]."""
    return torch.arange(window, device=count_B1.device) < count_B1[..., None]


def _read_last(group: LaneGroup, state_BLS: Tensor, count_B1: Tensor) -> Tensor:
    return state_BLS[..., -1]


def _read_ema_max(group: LaneGroup, state_BLS: Tensor, count_B1: Tensor) -> Tensor:
    return torch.where(count_B1 < group.window, state_BLS[..., 0], state_BLS[..., 1])


def _read_attention(group: LaneGroup, state_BLS: Tensor, count_B1: Tensor) -> Tensor:
    return state_BLS[..., 1] / state_BLS[..., 2]


def _read_rolling_mean(group: LaneGroup, state_BLS: Tensor, count_B1: Tensor) -> Tensor:
    warming_BL = state_BLS[..., :-1].sum(-1) / count_B1.clamp(min=1)
    return torch.where(count_B1 < group.window, warming_BL, state_BLS[..., -1])


def _read_rolling_attention(group: LaneGroup, state_BLS: Tensor, count_B1: Tensor) -> Tensor:
    query_BLw, value_BLw = state_BLS[..., :-1].chunk(2, -1)
    filled_B1w = _filled(count_B1.clamp(min=1), group.window)
    weight_BLw = query_BLw.masked_fill(~filled_B1w, -torch.inf).softmax(-1)
    return torch.where(count_B1 < group.window, (weight_BLw * value_BLw).sum(-1), state_BLS[..., -1])


READOUT: dict[LaneKind, Callable[[LaneGroup, Tensor, Tensor], Tensor]] = {
    "mean": _read_last,
    "max": _read_last,
    "ema_max": _read_ema_max,
    "attention": _read_attention,
    "cusum": _read_last,
    "rolling_mean_max": _read_rolling_mean,
    "rolling_attention": _read_rolling_attention,
}
"""Running value: (group, state [B, L, S], count [B, 1]) -> [B, L]; before a window is full, the average so far."""


def _merge_mean(left_BLS: Tensor, left_B: Tensor, right_BLS: Tensor, right_B: Tensor) -> Tensor:
    total_B11 = (left_B + right_B).clamp(min=1)[:, None, None]
    return left_BLS + (right_BLS - left_BLS) * right_B[:, None, None] / total_B11


def _merge_max(left_BLS: Tensor, left_B: Tensor, right_BLS: Tensor, right_B: Tensor) -> Tensor:
    return torch.maximum(left_BLS, right_BLS)


def _merge_attention(left_BLS: Tensor, left_B: Tensor, right_BLS: Tensor, right_B: Tensor) -> Tensor:
    top_BL = torch.maximum(left_BLS[..., 0], right_BLS[..., 0])
    reference_BL = torch.where(top_BL == -torch.inf, 0.0, top_BL)
    sums = [side[..., 1:] * torch.exp(side[..., 0] - reference_BL)[..., None] for side in (left_BLS, right_BLS)]
    return torch.cat((top_BL[..., None], sums[0] + sums[1]), -1)


MERGE: dict[LaneKind, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mean": _merge_mean,
    "max": _merge_max,
    "attention": _merge_attention,
}
"""Join two neighbouring segments: (left state, left count [B], right state, right count [B]) -> state. A kind that is
missing here cannot be merged: its maximum depends on the value with which the right segment was entered."""

"""One token of each streaming recurrence, for a whole group of lanes of B requests: the decode step.

The same recurrences as in :mod:`sense_kernels.recurrences`, written for a single row per request, where they need a
third of the operations. Each function takes the group, its state [B, L, S], the token's value and query [B, L] and the
number of tokens up to and with this one [B, 1], and returns the new state.

Shape letters: B requests, L lanes, S state floats of a lane, w window.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sense_kernels.lanes import LaneGroup, LaneKind

__all__ = ["STEP"]


def _mean(group: LaneGroup, state_BLS: Tensor, value_BL: Tensor, query_BL: Tensor, seen_B1: Tensor) -> Tensor:
    mean_BL = state_BLS[..., 0]
    return (mean_BL + (value_BL - mean_BL) / seen_B1)[..., None]


def _max(group: LaneGroup, state_BLS: Tensor, value_BL: Tensor, query_BL: Tensor, seen_B1: Tensor) -> Tensor:
    return torch.maximum(state_BLS[..., 0], value_BL)[..., None]


def _ema_max(group: LaneGroup, state_BLS: Tensor, value_BL: Tensor, query_BL: Tensor, seen_B1: Tensor) -> Tensor:
    ema_BL, best_BL = state_BLS.unbind(-1)
    ema_BL = torch.lerp(ema_BL, value_BL, torch.maximum(group.param, 1.0 / seen_B1))
    return torch.stack((ema_BL, _best(best_BL, ema_BL, seen_B1, group.window)), -1)


def _attention(group: LaneGroup, state_BLS: Tensor, value_BL: Tensor, query_BL: Tensor, seen_B1: Tensor) -> Tensor:
    top_BL = torch.maximum(state_BLS[..., 0], query_BL)
    keep_BL1 = torch.exp(state_BLS[..., 0] - top_BL)[..., None]
    weight_BL = torch.exp(query_BL - top_BL)
    added_BL2 = torch.stack((weight_BL * value_BL, weight_BL), -1)
    return torch.cat((top_BL[..., None], torch.addcmul(added_BL2, state_BLS[..., 1:], keep_BL1)), -1)


def _cusum(group: LaneGroup, state_BLS: Tensor, value_BL: Tensor, query_BL: Tensor, seen_B1: Tensor) -> Tensor:
    g_BL = (state_BLS[..., 0] + value_BL - group.param).clamp(min=0.0)
    return torch.stack((g_BL, torch.maximum(state_BLS[..., 1], g_BL)), -1)


def _push(ring_BLw: Tensor, value_BL: Tensor, seen_B1: Tensor) -> Tensor:
    """Return the ring with the token at its place, which makes it the window that ends there."""
    place_BL1 = ((seen_B1 - 1) % ring_BLw.shape[-1])[..., None].expand(-1, ring_BLw.shape[1], 1)
    return ring_BLw.scatter(2, place_BL1, value_BL[..., None])


def _best(best_BL: Tensor, readout_BL: Tensor, seen_B1: Tensor, window: int) -> Tensor:
    """Return the maximum, into which a readout enters once the window is full."""
    return torch.where(seen_B1 >= window, torch.maximum(best_BL, readout_BL), best_BL)


def _rolling_mean_max(
    group: LaneGroup, state_BLS: Tensor, value_BL: Tensor, query_BL: Tensor, seen_B1: Tensor
) -> Tensor:
    ring_BLw = _push(state_BLS[..., :-1], value_BL, seen_B1)
    best_BL = _best(state_BLS[..., -1], ring_BLw.mean(-1), seen_B1, group.window)
    return torch.cat((ring_BLw, best_BL[..., None]), -1)


def _rolling_attention(
    group: LaneGroup, state_BLS: Tensor, value_BL: Tensor, query_BL: Tensor, seen_B1: Tensor
) -> Tensor:
    # Both rings roll as one, queries as the first half of the lanes.
    rings_BLw = torch.cat(state_BLS[..., :-1].chunk(2, -1), 1)
    query_BLw, value_BLw = _push(rings_BLw, torch.cat((query_BL, value_BL), 1), seen_B1).chunk(2, 1)
    mean_BL = (query_BLw.softmax(-1) * value_BLw).sum(-1)
    best_BL = _best(state_BLS[..., -1], mean_BL, seen_B1, group.window)
    return torch.cat((query_BLw, value_BLw, best_BL[..., None]), -1)


STEP: dict[LaneKind, Callable[[LaneGroup, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "max": _max,
    "ema_max": _ema_max,
    "attention": _attention,
    "cusum": _cusum,
    "rolling_mean_max": _rolling_mean_max,
    "rolling_attention": _rolling_attention,
}
"""Fold one token: (group, state [B, L, S], value [B, L], query [B, L], tokens so far [B, 1]) -> new state."""

"""The obvious way to run a bank: one probe after another, each with its own product and its own aggregator.

Everything that is not a probe's own is shared, as anybody would: the norm of a site's rows, and the number of tokens.

Shape letters: T packed rows, D width, B requests, n rows of each, S state floats of a lane.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from _probes import EPS, Bank, Probe, Step
from torch import Tensor

from sense_kernels import Lane, LaneKind, LaneTable, State
from sense_kernels.recurrences import READOUT, UPDATE, Chunk

__all__ = ["Loop"]


class Loop:
    """The variant; see :mod:`_variants`.

    Args:
        bank: the probes.
        step: what they read.
    """

    def __init__(self, bank: Bank, step: Step) -> None:
        self._bank, self._step = bank, step
        self._each = len(step.rows.row_R) // step.requests
        fresh = bank.table.new_state(step.requests, bank.table.value.device)
        self._count_B, self._peak_BH = fresh.counts[:, 0].clone(), fresh.peak
        self._bias = [site[1][0] for site in bank.sites]
        self._tables = [LaneTable([_alone(probe.lane)], 1, self._count_B.device) for probe in bank.probes]
        self._state = [table.new_state(step.requests, self._count_B.device).state[:, None] for table in self._tables]

    def __call__(self) -> None:
        """Run the step."""
        x = [hidden_TD.float() for hidden_TD in self._step.hidden]
        scale = [(x_TD.square().mean(1, keepdim=True) + EPS).rsqrt() for x_TD in x]
        before_B = self._count_B
        self._count_B = before_B + self._each
        for head, probe in enumerate(self._bank.probes):
            z_TC = (x[probe.site] @ probe.weight) * scale[probe.site] + self._bias[probe.site]
            if self._each == 1:
                self._state[head], readout_B = _STEP[probe.lane.kind](probe, self._state[head], z_TC, self._count_B)
            else:
                readout_B = self._chunk(head, z_TC, before_B)
            self._peak_BH[:, head] = torch.maximum(self._peak_BH[:, head], readout_B)

    def _chunk(self, head: int, z_TC: Tensor, before_B: Tensor) -> Tensor:
        z_BnC = z_TC.view(len(before_B), self._each, -1)
        valid_Bn = torch.ones(z_BnC.shape[:2], dtype=torch.bool, device=z_BnC.device)
        group = self._tables[head].groups[0]
        chunk = Chunk(z_BnC[..., :1], z_BnC[..., -1:], valid_Bn, True, before_B)
        self._state[head] = UPDATE[group.kind](group, self._state[head], chunk)
        return READOUT[group.kind](group, self._state[head], self._count_B[:, None])[:, 0]

    @property
    def state(self) -> State:
        """The state as the bank's table lays it out."""
        lanes = [self._state[head].flatten(1) for head in self._bank.table.head.tolist()]
        count_BG = self._count_B[:, None].expand(-1, len(self._bank.table.groups))
        return State(torch.cat(lanes, 1), count_BG, self._peak_BH)


def _alone(lane: Lane) -> Lane:
    return replace(lane, head=0, value=0, query=min(lane.query, 0))


Step1 = tuple[Tensor, Tensor]
"""The new state [B, 1, S] and the readout [B]."""


def _mean(probe: Probe, state_B1S: Tensor, z_BC: Tensor, seen_B: Tensor) -> Step1:
    mean_B = state_B1S[:, 0, 0]
    mean_B = mean_B + (z_BC[:, 0] - mean_B) / seen_B
    return mean_B[:, None, None], mean_B


def _max(probe: Probe, state_B1S: Tensor, z_BC: Tensor, seen_B: Tensor) -> Step1:
    top_B = torch.maximum(state_B1S[:, 0, 0], z_BC[:, 0])
    return top_B[:, None, None], top_B


def _ema_max(probe: Probe, state_B1S: Tensor, z_BC: Tensor, seen_B: Tensor) -> Step1:
    ema_B, best_B = state_B1S[:, 0].unbind(1)
    alpha_B = (1.0 / seen_B).clamp(min=probe.lane.param)
    ema_B = ema_B + alpha_B * (z_BC[:, 0] - ema_B)
    return _windowed(ema_B[:, None], ema_B, best_B, seen_B >= probe.lane.window)


def _attention(probe: Probe, state_B1S: Tensor, z_BC: Tensor, seen_B: Tensor) -> Step1:
    top_B, numerator_B, denominator_B = state_B1S[:, 0].unbind(1)
    query_B = z_BC[:, -1] * probe.lane.param
    new_top_B = torch.maximum(top_B, query_B)
    keep_B, weight_B = (top_B - new_top_B).exp(), (query_B - new_top_B).exp()
    numerator_B = numerator_B * keep_B + weight_B * z_BC[:, 0]
    denominator_B = denominator_B * keep_B + weight_B
    return torch.stack((new_top_B, numerator_B, denominator_B), 1)[:, None], numerator_B / denominator_B


def _cusum(probe: Probe, state_B1S: Tensor, z_BC: Tensor, seen_B: Tensor) -> Step1:
    g_B = (state_B1S[:, 0, 0] + z_BC[:, 0] - probe.lane.param).clamp(min=0.0)
    best_B = torch.maximum(state_B1S[:, 0, 1], g_B)
    return torch.stack((g_B, best_B), 1)[:, None], best_B


def _rolling_mean_max(probe: Probe, state_B1S: Tensor, z_BC: Tensor, seen_B: Tensor) -> Step1:
    window, ring_Bw = probe.lane.window, state_B1S[:, 0, :-1]
    ring_Bw = ring_Bw.scatter(1, ((seen_B - 1) % window)[:, None], z_BC)
    mean_B = ring_Bw.sum(1) / seen_B.clamp(max=window)
    return _windowed(ring_Bw, mean_B, state_B1S[:, 0, -1], seen_B >= window)


def _rolling_attention(probe: Probe, state_B1S: Tensor, z_BC: Tensor, seen_B: Tensor) -> Step1:
    window = probe.lane.window
    query_Bw, value_Bw, best_B1 = state_B1S[:, 0].split((window, window, 1), 1)
    place_B1 = ((seen_B - 1) % window)[:, None]
    query_Bw = query_Bw.scatter(1, place_B1, z_BC[:, -1:] * probe.lane.param)
    value_Bw = value_Bw.scatter(1, place_B1, z_BC[:, :1])
    empty_Bw = torch.arange(window, device=seen_B.device) >= seen_B[:, None]
    mean_B = (query_Bw.masked_fill(empty_Bw, -torch.inf).softmax(1) * value_Bw).sum(1)
    return _windowed(torch.cat((query_Bw, value_Bw), 1), mean_B, best_B1[:, 0], seen_B >= window)


def _windowed(held: Tensor, readout_B: Tensor, best_B: Tensor, full_B: Tensor) -> Step1:
    """Take a readout into the maximum where the window is full, and append it to the other floats [B, S - 1]."""
    best_B = torch.where(full_B, torch.maximum(best_B, readout_B), best_B)
    state_B1S = torch.cat((held, best_B[:, None]), 1)[:, None]
    return state_B1S, torch.where(full_B, best_B, readout_B)


_STEP: dict[LaneKind, Callable[[Probe, Tensor, Tensor, Tensor], Step1]] = {
    "mean": _mean,
    "max": _max,
    "ema_max": _ema_max,
    "attention": _attention,
    "cusum": _cusum,
    "rolling_mean_max": _rolling_mean_max,
    "rolling_attention": _rolling_attention,
}
"""Fold one token: (probe, state [B, 1, S], value and query [B, 1 or 2], tokens with this one [B])."""

"""Ways to score and fold a bank: the kernels, and what they are compared with.

Each is made of a bank and a step, runs the step when called, and keeps the streaming state in ``state``.

Shape letters: T packed rows, D width, B requests, n rows of each, C logit columns, L lanes, S state floats, G groups,
H heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from _bench import compiled, graph_of
from _probes import EPS, Bank, Step
from torch import Tensor

from sense_kernels import FoldRows, HostSites, RowTensors, State, fold, fold_torch, score, score_torch
from sense_kernels.recurrences import READOUT, UPDATE, Chunk

__all__ = ["Captured", "Dense", "Eager", "Ours"]


class Ours:
    """The path that a guard takes: every site into its slice of the logits, then one fold."""

    def __init__(self, bank: Bank, step: Step) -> None:
        self._bank, self._step = bank, step
        device, rows = bank.table.value.device, len(step.rows.row_R)
        self.state = bank.table.new_state(step.requests, device)
        self._rows: FoldRows | RowTensors = step.rows if device.type == "cpu" else step.rows.to(device)
        self._logits_TC, self._outs = bank.new_logits(rows)
        self._scratch = bank.new_scratch()
        weights, biases = [site[0] for site in bank.sites], [site[1] for site in bank.sites]
        host = HostSites(weights, biases, EPS) if device.type == "cpu" else None
        self._host = host if host is not None and rows <= host.few else None

    def __call__(self) -> None:
        """Run the step."""
        if self._host is not None:
            for index, hidden_TD in enumerate(self._step.hidden):
                self._host.put(index, hidden_TD)
            self._host.write(self._outs, self._logits_TC)
        else:
            for hidden_TD, (*weights, low), out in zip(self._step.hidden, self._bank.sites, self._outs, strict=True):
                score(hidden_TD, *weights, EPS, out, None, low, *self._scratch)
        fold(*self.state, self._logits_TC, self._rows, self._bank.table)


class Eager:
    """The twins."""

    def __init__(self, bank: Bank, step: Step) -> None:
        self._bank, self._step = bank, step
        self.state = bank.table.new_state(step.requests, bank.table.value.device)
        self._logits_TC, self._outs = bank.new_logits(len(step.rows.row_R))

    def __call__(self) -> None:
        """Run the step."""
        for hidden_TD, (*weights, low), out in zip(self._step.hidden, self._bank.sites, self._outs, strict=True):
            score_torch(hidden_TD, *weights, EPS, out, None, low)
        fold_torch(*self.state, self._logits_TC, self._step.rows, self._bank.table)


class Dense:
    """The twins' mathematics as one function of tensors, for a compiler.

    Args:
        bank: the probes.
        step: what they read; every request has equally many rows, all of the same code.
        compiler: from the function to what is called.
    """

    def __init__(
        self, bank: Bank, step: Step, compiler: Callable[[Callable[..., Any]], Callable[..., Any]] = compiled
    ) -> None:
        self._step, self._table = step, bank.table
        device = bank.table.value.device
        self.state = bank.table.new_state(step.requests, device)
        self._weights, self._biases = bank.whole_weights(), [site[1] for site in bank.sites]
        self._order = torch.cat([bank.table.head[g.lanes][:: g.parts] for g in bank.table.groups]).argsort()
        self._valid_Bn = torch.ones(step.requests, len(step.rows.row_R) // step.requests, device=device).bool()
        self._run = compiler(self._update)

    def __call__(self) -> None:
        """Run the step."""
        self._run(self._step.hidden, *self.state)

    def _update(self, hidden: tuple[Tensor, ...], state_BS: Tensor, count_BG: Tensor, peak_BH: Tensor) -> None:
        z_BnC = self._logits(hidden).view(*self._valid_Bn.shape, -1)
        value_BnL, query_BnL = z_BnC[..., self._table.value], z_BnC[..., self._table.query]
        total_BG = count_BG + self._valid_Bn.shape[1]
        states, readouts = [], []
        for index, group in enumerate(self._table.groups):
            old_BLS = state_BS[:, group.offset : group.stop].view(len(state_BS), -1, group.width)
            lanes = value_BnL[..., group.lanes], query_BnL[..., group.lanes]
            new_BLS = UPDATE[group.kind](group, old_BLS, Chunk(*lanes, self._valid_Bn, True, count_BG[:, index]))
            lane_BL = READOUT[group.kind](group, new_BLS, total_BG[:, index : index + 1])
            states.append(new_BLS.flatten(1))
            readouts.append(lane_BL.view(len(lane_BL), -1, group.parts).sum(-1) if group.parts > 1 else lane_BL)
        state_BS.copy_(torch.cat(states, 1))
        count_BG.copy_(total_BG)
        peak_BH.copy_(torch.maximum(peak_BH, torch.cat(readouts, 1)[:, self._order]))

    def _logits(self, hidden: tuple[Tensor, ...]) -> Tensor:
        columns = []
        for hidden_TD, weight, bias in zip(hidden, self._weights, self._biases, strict=True):
            x_TD = hidden_TD.float()
            mean_square_T1 = torch.linalg.vecdot(x_TD, x_TD)[:, None] / x_TD.shape[1] + EPS
            inverse_rms_T1 = mean_square_T1.rsqrt() + mean_square_T1 * 0.0
            columns.append((x_TD @ weight)[:, : len(bias)] * inverse_rms_T1 + bias)
        z_TC = torch.cat(columns, 1)
        return z_TC + z_TC * 0.0


class Captured:
    """A variant as a CUDA graph, with fresh state."""

    def __init__(self, run: Any, bank: Bank) -> None:
        self.state: State = run.state
        self._replay = graph_of(run)
        bank.table.reset(*self.state, torch.arange(len(self.state.state), device=self.state.state.device))

    def __call__(self) -> None:
        """Run the step."""
        self._replay()

"""The CPU's fold of whole chunks against the twin: random lanes, rows, drafts, KV blocks and bad logits."""

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from sense_kernels import PROMPT, RESPONSE, TAIL, WATCHED, FoldRows, Lane, LaneKind, LaneTable, State, fold_torch
from sense_kernels.chunk import fold_chunks

COLUMNS, SLOTS, BLOCKS, STEPS = 12, 6, 10, 3
PACKED = 4 * 29 + 3
"""Rows of a step at most, with three that belong to nobody."""
SPANS = (PROMPT, TAIL, RESPONSE, PROMPT | RESPONSE, PROMPT | TAIL | RESPONSE)
CODES = (PROMPT, PROMPT | TAIL, RESPONSE)
SOFT = ("attention", "rolling_attention")


def random_table(rng: np.random.Generator) -> LaneTable:
    """Return heads of random kinds, of one to three lanes each; some queries are scaled beyond the shared maximum."""
    lanes, heads = [], int(rng.integers(1, 12))
    for head in range(heads):
        kind: LaneKind = rng.choice(get_args(LaneKind))
        scale = rng.choice([0.1, 1.0, 40.0]) if kind in SOFT else rng.choice([0.05, 0.3, 0.9, 1.0])
        window, span = int(rng.integers(1, 20)), int(rng.choice(SPANS))
        lanes += [
            Lane(
                kind=kind,
                head=head,
                value=int(rng.integers(COLUMNS)),
                query=int(rng.integers(COLUMNS)),
                span=span,
                param=float(scale),
                window=window,
            )
            for _ in range(int(rng.integers(1, 4)) if kind in SOFT else 1)
        ]
    return LaneTable(lanes, heads)


def random_rows(rng: np.random.Generator) -> FoldRows:
    """Return a step of one to four requests: equally long, or of zero to thirteen rows each."""
    requests = int(rng.integers(1, 5))
    lengths = np.full(requests, rng.integers(1, 30)) if rng.random() < 0.3 else rng.integers(0, 14, requests)
    total = int(lengths.sum())
    slots = rng.permutation(SLOTS)[:requests]
    slots[0] = -1 if rng.random() < 0.2 else slots[0]
    block_R = np.full(total, -1)
    ends = rng.permutation(total)[: min(BLOCKS, total // 4)]
    block_R[ends] = rng.permutation(BLOCKS)[: len(ends)]
    return FoldRows(
        row_R=rng.permutation(total + 3)[:total] if rng.random() < 0.5 else np.arange(total),
        code_R=rng.choice(CODES, total) | np.where(rng.random(total) < rng.choice([0, 0.1, 0.9]), WATCHED, 0),
        start_B=np.cumsum([0, *lengths]),
        slot_B=slots,
        accepted_B=rng.integers(0, lengths + 1) if rng.random() < 0.3 else None,
        block_R=block_R if rng.random() < 0.5 else None,
    )


def random_logits(rng: np.random.Generator) -> Tensor:
    """Return logits, one of which may not be finite."""
    z_TC = rng.normal(size=(PACKED, COLUMNS)) * rng.choice([1, 100])
    if rng.random() < 0.4:
        z_TC[rng.integers(PACKED), rng.integers(COLUMNS)] = rng.choice([np.nan, np.inf, -np.inf, 1e38, -1e38])
    order = "F" if rng.random() < 0.3 else "C"
    return torch.from_numpy(z_TC.astype(np.float32, order=order))


@dataclass
class Side:
    """What one of the two folds may write."""

    fold: Any
    state: State
    blocks: State

    def run(self, z_TC: Tensor, rows: FoldRows, table: LaneTable) -> list[Tensor]:
        """Fold a step; return all tables and the trace."""
        trace = torch.full((len(z_TC), table.heads), 7.0)
        self.fold(*self.state, z_TC.clone(), rows, table, trace, self.blocks)
        return [*self.state, *self.blocks, trace]


@pytest.mark.parametrize("seed", range(60))
@torch.inference_mode()
def test_chunks_fold_as_in_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = random_table(rng)
    sides = [Side(fold, table.new_state(SLOTS), table.new_state(BLOCKS)) for fold in (fold_torch, fold_chunks)]
    for _ in range(STEPS):
        rows = random_rows(rng).committed()
        z_TC = random_logits(rng)
        for want, got in zip(*(side.run(z_TC, rows, table) for side in sides), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4, equal_nan=True)


@pytest.mark.parametrize(("columns", "rows"), [(1, 3), (2, 1), (2, 3)])
def test_the_logits_are_left_as_they_were(columns: int, rows: int) -> None:
    table = LaneTable([Lane(kind="max", head=0, value=0, span=PROMPT)], 1)
    z_TC = torch.full((rows, columns), torch.inf, requires_grad=True)
    state = table.new_state(1)
    codes = np.full(rows, PROMPT)
    fold_chunks(*state, z_TC, FoldRows(np.arange(rows), codes, np.array([0, rows]), np.array([0])), table)
    assert z_TC.isinf().all()
    assert state.state.isnan().all()


@torch.inference_mode()
def test_queries_far_apart_take_the_path_with_a_maximum_for_each_window() -> None:
    table = LaneTable([Lane(kind="rolling_attention", head=0, value=0, query=1, span=PROMPT, param=1.0, window=4)], 1)
    z_TC = torch.tensor([[1.0, 0.0], [2.0, -500.0], [3.0, -500.0], [4.0, -500.0], [5.0, -500.0], [6.0, 0.0]])
    state = table.new_state(1)
    codes = np.full(6, PROMPT)
    rows = FoldRows(np.arange(6), codes, np.array([0, 6]), np.array([0]))
    fold_chunks(*state, z_TC, rows, table)
    # The windows hold 1..4, 2..5 and 3..6: the far query of the first and of the last takes all the weight.
    torch.testing.assert_close(state.state[0, -1], torch.tensor(6.0))
    small = table.new_state(1)
    fold_chunks(*small, z_TC[:5], FoldRows(np.arange(5), codes[:5], np.array([0, 5]), np.array([0])), table)
    torch.testing.assert_close(small.state[0, -1], torch.tensor(3.5))

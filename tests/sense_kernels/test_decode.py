"""The CPU's decode step against the twin: all kinds, warm-up and after, and rows of several codes in one step."""

import math
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from sense_kernels import PROMPT, RESPONSE, TAIL, WATCHED, FoldRows, Lane, LaneKind, LaneTable, State, fold_torch
from sense_kernels.decode import fold_one_row

C, B = 4, 6
KINDS = get_args(LaneKind)
CODES = (PROMPT, PROMPT | TAIL, PROMPT | TAIL | WATCHED, RESPONSE | WATCHED, RESPONSE, 0)


def bank(kinds: tuple[LaneKind, ...] = KINDS) -> LaneTable:
    """Return every kind with one and with three lanes a head, over all spans; heads of a group lie apart."""
    heads = [(kind, span, parts) for span in (PROMPT | RESPONSE, TAIL, RESPONSE) for parts in (1, 3) for kind in kinds]
    heads += heads[::2]
    lanes = [
        Lane(
            kind=kind,
            head=head,
            value=(head + part) % C,
            query=(head + part + 1) % C,
            param=0.2 + 0.1 * part,
            window=3,
            span=span,
        )
        for head, (kind, span, parts) in enumerate(heads)
        for part in range(parts)
    ]
    return LaneTable(lanes, len(heads))


def step(codes: npt.NDArray[np.int64], order: npt.NDArray[np.int64]) -> FoldRows:
    """Return one row of each request, with requests, rows and slots in orders of their own."""
    requests = len(codes)
    slots = order[::-1].copy() + 1
    return FoldRows(order, codes, np.arange(requests + 1), slots, None, np.where(codes & WATCHED, slots, -1))


def run_both(table: LaneTable, steps: list[tuple[Tensor, FoldRows]]) -> tuple[list[Tensor], list[Tensor]]:
    """Fold with the decode step and with the twin; return all that they may write."""
    both: tuple[list[Tensor], list[Tensor]] = ([], [])
    for function, written in zip((fold_one_row, fold_torch), both, strict=True):
        state, blocks = table.new_state(B + 2), State(*(tensor.fill_(7) for tensor in table.new_state(B + 2)))
        for logits, rows in steps:
            trace = torch.full((len(logits), table.heads), 7.0)
            function(*state, logits.clone(), rows, table, trace, blocks)
            written.append(trace)
        written += [*state, *blocks]
    return both


def random_steps(count: int, requests: int = B, codes: tuple[int, ...] = CODES) -> list[tuple[Tensor, FoldRows]]:
    """Return steps whose requests have codes drawn one by one."""
    rng = np.random.default_rng(0)
    return [
        (torch.randn(requests + 1, C), step(rng.choice(codes, requests), rng.permutation(requests)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 12])
def test_rows_of_any_codes_fold_as_in_the_twin(count: int, traffic: Any) -> None:
    traffic.assert_same(*run_both(bank(), random_steps(count)))


def test_rows_and_slots_that_follow_one_another_fold_as_in_the_twin(traffic: Any) -> None:
    rng = np.random.default_rng(0)
    codes = [rng.choice(CODES, B) for _ in range(5)] + [np.full(B, RESPONSE | WATCHED)] * 2
    in_order = [FoldRows(np.arange(1, B + 1), code, np.arange(B + 1), np.arange(1, B + 1)) for code in codes]
    traffic.assert_same(*run_both(bank(), [(torch.randn(B + 1, C), rows) for rows in in_order]))


@pytest.mark.parametrize("code", CODES)
def test_rows_of_one_code_fold_as_in_the_twin(code: int, traffic: Any) -> None:
    traffic.assert_same(*run_both(bank(), random_steps(5, codes=(code,))))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone_folds_as_in_the_twin(kind: LaneKind, traffic: Any) -> None:
    traffic.assert_same(*run_both(bank((kind,)), random_steps(7, requests=1)))


def test_a_head_that_has_folded_no_row_reads_minus_infinity() -> None:
    table = bank()
    state = table.new_state(2)
    fold_one_row(*state, torch.randn(1, C), step(np.array([PROMPT | WATCHED]), np.array([0])), table)
    read = [group.span & PROMPT != 0 for group in table.groups for _ in range(group.heads)]
    first = [lane for group in table.groups for lane in range(*group.lanes.indices(len(table.value)))[:: group.parts]]
    by_group = state.peak[1, table.head[first]]
    assert by_group.isfinite().tolist() == read
    assert (by_group[~torch.tensor(read)] == -math.inf).all()
    assert (state.peak[0] == -math.inf).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_logit_poisons_as_in_the_twin(bad: float, traffic: Any) -> None:
    steps = random_steps(8, codes=(RESPONSE | TAIL | WATCHED,))
    steps[2][0][steps[2][1].row_R[1], 1] = bad
    steps[0][0][steps[0][1].row_R[4], 2] = bad
    table = bank()
    got, want = run_both(table, steps)
    for one, other in zip(got, want, strict=True):
        assert one.isnan().equal(other.isnan())
    traffic.assert_same([tensor.nan_to_num(7.0) for tensor in got], [tensor.nan_to_num(7.0) for tensor in want])
    peak = got[len(steps) + 2]
    poisoned = peak.isnan().any(1)
    assert poisoned.sum() == len({int(steps[2][1].slot_B[1]), int(steps[0][1].slot_B[4])})
    assert not peak[poisoned].isnan().all()


def test_a_long_run_stays_close_to_the_twin(traffic: Any) -> None:
    codes = (PROMPT,) * 3 + (RESPONSE | WATCHED,)
    traffic.assert_same(*run_both(bank(), random_steps(60, codes=codes)), tolerance=3e-6)

"""The fold kernel in Triton's interpreter: close to its twin and the oracle, and the same bits however tokens come."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sense_kernels import PROMPT, RESPONSE, TAIL, FoldRows, Lane, LaneKind, LaneTable, fold_triton, readout_torch
from sense_kernels.lanes import GROUP_LANES
from sense_kernels.testing import COLUMNS, assert_close

# Untaken branches of a select meet infinities and divisions by 0: numpy warns of them inside the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
KINDS = get_args(LaneKind)
C = 5
SPANS = {"all": PROMPT | RESPONSE, "prompt": PROMPT, "response": RESPONSE, "tail": TAIL}


def lanes_of(kind: Any, head: int, parts: int = 1, window: int = 4, span: str = "all") -> list[Lane]:
    """Return the lanes of one head, with columns and parameters of their own."""
    own = range(7 * head, 7 * head + parts)
    return [
        Lane(
            kind=kind,
            head=head,
            value=k % C,
            query=(k + 2) % C,
            param=0.2 + 0.1 * (k % 7),
            window=window,
            span=SPANS[span],
        )
        for k in own
    ]


def mixed() -> LaneTable:
    """All kinds in one bank, with spans of every sort, heads of several lanes, and windows from 1 on."""
    heads: list[dict[str, Any]] = [
        {"kind": "rolling_attention", "window": 5, "parts": 2, "span": "prompt"},
        {"kind": "mean", "span": "tail"},
        {"kind": "attention", "parts": 3, "span": "response"},
        {"kind": "rolling_mean_max", "window": 1},
        {"kind": "cusum", "span": "prompt"},
        {"kind": "ema_max", "window": 3},
        {"kind": "max", "parts": 2, "span": "tail"},
        {"kind": "rolling_mean_max", "window": 9, "parts": 2, "span": "tail"},
        {"kind": "attention"},
        {"kind": "rolling_attention", "window": 2, "span": "response"},
        {"kind": "mean"},
    ]
    lanes = [lane for i in range(22) for lane in lanes_of(head=i, **heads[i % len(heads)])]
    return LaneTable(lanes, 22)


def agree(table: LaneTable, traffic: Any, of: Any, chunks: Any, seed: int = 0) -> None:
    """Check the kernel against the twin on all that they leave behind."""
    ref, tri = (traffic.feed(run, table, of, chunks, seed) for run in (traffic.run_torch, traffic.run_triton))
    for want, got in zip(ref, tri, strict=True):
        assert_close(ref=want, tri=got, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_twins_with_any_number_of_heads(kind: LaneKind, traffic: Any) -> None:
    of = traffic.requests([(5, 3), (1, 0), (2, 5)], C)
    for heads in COLUMNS:
        table = LaneTable([lane for head in range(heads) for lane in lanes_of(kind, head)], heads)
        assert (len(table.groups) > 1) == (heads > GROUP_LANES)
        agree(table, traffic, of, [[4, 4], [1], [1, 2, 4]])


@pytest.mark.parametrize("kind", ["max", "attention", "rolling_attention"])
def test_a_head_may_have_more_lanes_than_a_group_holds(kind: LaneKind, traffic: Any) -> None:
    parts = GROUP_LANES + 2
    table = LaneTable([lane for head in range(2) for lane in lanes_of(kind, head, parts)], 2)
    agree(table, traffic, traffic.requests([(4, 2)], C), [[3, 3]])


def test_requests_shared_out_among_programs_are_each_folded_once(traffic: Any) -> None:
    table = LaneTable([lane for head in range(3) for lane in lanes_of("mean", head)], 3)
    of = traffic.requests([(2, 1)] * 20, C)
    agree(table, traffic, of, traffic.whole(of))


@pytest.mark.parametrize("lengths", [[(1, 0)], [(10, 7)], [(9, 4)] * 10], ids=["1", "17", "130"])
def test_a_bank_of_all_kinds_is_the_twins(lengths: list[tuple[int, int]], traffic: Any) -> None:
    of = traffic.requests(lengths, C)
    agree(mixed(), traffic, of, traffic.whole(of))


# Without shrinking: in the interpreter it would take many minutes.
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_chunking_gives_the_whole_sequence_value(data: st.DataObject, oracle: Any, traffic: Any) -> None:
    of, chunks, seed = data.draw(traffic.cases(oracle.COLUMNS, prompt=8, reply=4))
    table = oracle.table()
    ref, tri = (traffic.feed(run, table, of, chunks, seed) for run in (traffic.run_torch, traffic.run_triton))
    for want, got in zip(ref, tri, strict=True):
        assert_close(ref=want, tri=got, dtype=torch.float32)
    readout = readout_torch(tri.state, tri.counts, torch.arange(len(of)), table)
    for i, request in enumerate(of):
        z = request.rows_nX.double().numpy()
        np.testing.assert_allclose(readout[i].numpy(), oracle.values(z, request.codes_n), rtol=1e-5, atol=1e-5)
        want = oracle.greatest_values(z, request.codes_n)
        np.testing.assert_allclose(tri.peak[i].numpy(), want, rtol=1e-5, atol=1e-5)


def test_the_chunks_and_the_batch_mates_change_no_bit(traffic: Any) -> None:
    of, table = traffic.requests([(9, 4), (3, 6), (1, 2)], C), mixed()
    want = traffic.feed(traffic.run_triton, table, of, traffic.whole(of), seed=1)
    for chunks in (traffic.one_by_one(of), traffic.prompt_then_steps(of), [[2, 5, 6], [8, 1], [2, 1]]):
        traffic.assert_same_bits(traffic.feed(traffic.run_triton, table, of, chunks, seed=2), want)
    alone = traffic.feed(traffic.run_triton, table, of[1:2], [traffic.halves(of[1])])
    traffic.assert_same_bits(alone[:3], [tensor[1:2] for tensor in want[:3]])
    traffic.assert_same_bits([alone.trace], [want.trace[13:22]])


def test_narrow_integers_and_strided_logits_change_no_bit(traffic: Any) -> None:
    (request,), table = traffic.requests([(5, 3)], C), mixed()
    ends = np.array([-1, -1, 1, -1, -1, -1, -1, -1])
    rows = FoldRows(np.arange(8), request.codes_n, np.array([0, 8]), np.array([1]), np.array([6]), ends).to(traffic.CPU)
    narrow = type(rows)(*(None if tensor is None else tensor.int() for tensor in rows))  # type: ignore[arg-type]
    wide = torch.full((8, C + 4), torch.nan)
    wide[:, 2 : 2 + C] = request.rows_nX
    results = []
    for given_rows, logits in ((rows, request.rows_nX), (narrow, wide[:, 2 : 2 + C])):
        state, blocks, trace = table.new_state(2), table.new_state(2), torch.full((8, table.heads), 7.0)
        fold_triton(*state, logits, given_rows, table, trace, blocks)
        results.append([*state, *blocks, trace])
    traffic.assert_same_bits(*results)


def test_a_decode_step_that_names_no_rows_changes_no_bit(traffic: Any) -> None:
    table, z = mixed(), torch.randn(4, C)
    step = FoldRows(np.arange(4), np.full(4, RESPONSE), np.arange(5), np.array([2, -1, 0, 1])).to(traffic.CPU)
    results = []
    for rows in (step, step._replace(row=None, start=None)):
        state, trace = table.new_state(3), torch.full((4, table.heads), 7.0)
        fold_triton(*state, z, rows, table, trace)
        results.append([*state, trace])
    assert (results[0][1] != 0).any()
    traffic.assert_same_bits(*results)


def test_a_request_without_rows_and_a_step_without_requests_change_nothing(traffic: Any) -> None:
    table, z = mixed(), torch.randn(3, C)
    state = table.new_state(3)
    for tensor in state:
        tensor.fill_(7)
    none = np.empty(0, np.int64)
    empty = FoldRows(none, none, np.array([0]), none)
    for rows in (empty, replace(empty, start_B=np.array([0, 0, 0]), slot_B=np.array([2, 0]))):
        fold_triton(*state, z, rows.to(traffic.CPU), table)
        assert all((tensor == 7).all() for tensor in state)


@pytest.mark.parametrize("kind", ["attention", "rolling_attention"])
@pytest.mark.parametrize("bad", [-3e38, 3e38])
def test_a_query_that_overflows_weighs_nothing_or_poisons_as_in_the_twin(kind: Any, bad: float, traffic: Any) -> None:
    table = LaneTable([Lane(kind=kind, head=0, value=0, query=1, param=10.0, window=3)], 1)
    of = traffic.requests([(3, 2)], 2)
    of[0].rows_nX[1, 1] = bad
    agree(table, traffic, of, [[2, 3]])
    assert traffic.feed(traffic.run_triton, table, of, [[2, 3]]).peak.isnan().item() == (bad > 0)

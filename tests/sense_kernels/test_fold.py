"""The fold, each of its paths, against a plain sequential oracle in float64: any chunking, interleaving and padding."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sense_kernels import WATCHED, FoldRows, Lane, LaneTable, State, fold, readout_torch
from sense_kernels.fold import pack_arguments
from sense_kernels.rows import IntArray

# The twin's closed forms and the kernel meet infinities on purpose: numpy warns of them inside Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
PATHS = ("run_torch", "run_cpu", "run_triton")


@settings(max_examples=75, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("path", ["run_torch", "run_cpu"])
def test_any_chunking_gives_the_whole_sequence_value(path: str, data: st.DataObject, oracle: Any, traffic: Any) -> None:
    of, chunks, seed = data.draw(traffic.cases(oracle.COLUMNS, prompt=14, reply=6))
    table = oracle.table()
    fed = traffic.feed(getattr(traffic, path), table, of, chunks, seed)
    readout = readout_torch(fed.state, fed.counts, torch.arange(len(of)), table)
    for i, request in enumerate(of):
        z = request.rows_nX.double().numpy()
        np.testing.assert_allclose(readout[i].numpy(), oracle.values(z, request.codes_n), rtol=1e-5, atol=1e-5)
        want = oracle.greatest_values(z, request.codes_n)
        np.testing.assert_allclose(fed.peak[i].numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_the_trace_holds_the_readout_at_each_watched_row(path: str, oracle: Any, traffic: Any) -> None:
    of = traffic.requests([(4, 5), (6, 0)], oracle.COLUMNS)
    trace = traffic.feed(getattr(traffic, path), oracle.table(), of, [[3, 6], [6]]).trace
    for request, rows in zip(of, trace.split([9, 6]), strict=True):
        for t in np.flatnonzero(request.codes_n & WATCHED):
            want = oracle.values(request.rows_nX[: t + 1].double().numpy(), request.codes_n[: t + 1])
            np.testing.assert_allclose(rows[t].numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_bad_logit_poisons_the_heads_that_read_it_and_nothing_else(path: str, oracle: Any, traffic: Any) -> None:
    run, table = getattr(traffic, path), oracle.table()
    of = traffic.requests([(5, 4), (4, 1)], oracle.COLUMNS)
    chunks = [[4, 1, 1, 3], [3, 2]]
    clean = traffic.feed(run, table, of, chunks)
    for bad, row, column in ((math.nan, 0, 0), (math.inf, 4, 1), (-math.inf, 6, 2)):
        of[0].rows_nX[row, column], good = bad, of[0].rows_nX[row, column].item()
        fed = traffic.feed(run, table, of, chunks)
        of[0].rows_nX[row, column] = good
        hit = torch.zeros(2, oracle.HEADS, dtype=torch.bool)
        for lane in oracle.LANES:
            hit[0, lane.head] |= column in (lane.value, lane.query) and bool(lane.span & int(of[0].codes_n[row]))
        assert fed.peak.isnan().equal(hit)
        kept = [[one.peak[~hit], one.state[1], one.counts] for one in (fed, clean)]
        traffic.assert_same_bits(*kept)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_without_a_slot_leaves_every_table_alone(path: str, oracle: Any, traffic: Any) -> None:
    table = oracle.table()
    state = State(*(torch.full_like(tensor, 7) for tensor in table.new_state(3)))
    rows = FoldRows(np.arange(4), traffic.row_codes(4, 4), np.array([0, 3, 4]), np.array([-1, -1]))
    trace = torch.full((4, oracle.HEADS), 7.0)
    getattr(traffic, path)(state, torch.randn(4, oracle.COLUMNS), rows, table, trace)
    assert all((tensor == 7).all() for tensor in (*state, trace))


@pytest.mark.parametrize("path", PATHS)
def test_only_accepted_rows_are_folded(path: str, oracle: Any, traffic: Any) -> None:
    run, table = getattr(traffic, path), oracle.table()
    of = traffic.requests([(3, 4), (2, 3), (1, 4)], oracle.COLUMNS)
    z, codes = torch.cat([request.rows_nX for request in of]), np.concatenate([request.codes_n for request in of])
    accepted, start = np.array([5, 0, 9]), np.array([0, 7, 12, 17])
    state, alone = table.new_state(4), table.new_state(4)
    z[[5, 6, *range(7, 12)]] = torch.nan
    trace = torch.full((17, oracle.HEADS), 7.0)
    slot, rows = np.array([2, 0, 3]), np.r_[0:5, 12:17]
    run(state, z, FoldRows(np.arange(17), codes, start, slot, accepted), table, trace)
    run(alone, z, FoldRows(rows, codes[rows], np.array([0, 5, 10]), slot[[0, 2]]), table, torch.empty_like(trace))
    traffic.assert_same_bits(state, alone)
    assert (trace[5:12] == 7).all()
    assert state.counts[:, 0].tolist() == [0, 0, 5, 5]


@pytest.mark.parametrize("path", PATHS)
def test_a_block_holds_the_state_at_its_end_and_can_be_resumed(path: str, oracle: Any, traffic: Any) -> None:
    run, table = getattr(traffic, path), oracle.table()
    same = traffic.assert_same_bits if path == "run_triton" else traffic.assert_same
    (request,) = traffic.requests([(6, 5)], oracle.COLUMNS)
    ends = np.full(11, -1)
    ends[[3, 7]] = 2, 0
    blocks = State(*(torch.full_like(tensor, 7) for tensor in table.new_state(4)))

    def fold_rows(state: State, first: int, stop: int, block_R: IntArray | None = None) -> State:
        span, start = np.arange(first, stop), np.array([0, stop - first])
        rows = FoldRows(span, request.codes_n[span], start, np.array([0]), block_R=block_R)
        run(state, request.rows_nX, rows, table, None, blocks)
        return state

    uninterrupted = fold_rows(table.new_state(1), 0, 11, ends)
    assert all((tensor[[1, 3]] == 7).all() for tensor in blocks)
    for block, stop in ((2, 4), (0, 8)):
        held = State(*(tensor[block, None].clone() for tensor in blocks))
        same(held, fold_rows(table.new_state(1), 0, stop))
        same(fold_rows(held, stop, 11), uninterrupted)


@pytest.mark.parametrize("path", PATHS)
def test_block_numbers_without_blocks_change_nothing(path: str, oracle: Any, traffic: Any) -> None:
    run, table, z = getattr(traffic, path), oracle.table(), torch.randn(4, oracle.COLUMNS)
    plain = FoldRows(np.arange(4), traffic.row_codes(3, 4), np.array([0, 4]), np.array([0]))
    state, numbered = table.new_state(1), table.new_state(1)
    run(state, z, plain, table)
    run(numbered, z, replace(plain, block_R=np.array([-1, 3, -1, 0])), table)
    traffic.assert_same(state, numbered)


@pytest.mark.parametrize("cut", ["whole", "one_by_one", "prompt_then_steps"])
def test_on_the_cpu_the_state_hardly_depends_on_the_chunks(cut: str, oracle: Any, traffic: Any) -> None:
    of, table = traffic.requests([(30, 9), (4, 17), (1, 1), (12, 0)], oracle.COLUMNS), oracle.table()
    fed = traffic.feed(traffic.run_cpu, table, of, getattr(traffic, cut)(of), seed=1)
    for i, request in enumerate(of):
        alone = traffic.feed(traffic.run_cpu, table, [request], [traffic.halves(request)], seed=2)
        traffic.assert_same([tensor[i] for tensor in fed[:3]], [tensor[0] for tensor in alone[:3]])


def test_the_op_is_registered_as_it_behaves(oracle: Any, traffic: Any) -> None:
    table, z = oracle.table(), torch.randn(6, oracle.COLUMNS)
    for optional in (True, False):
        state, blocks, trace = table.new_state(3), table.new_state(2), torch.zeros(6, oracle.HEADS)
        rows = FoldRows(
            np.arange(6),
            traffic.row_codes(2, 6),
            np.array([0, 4, 6]),
            np.array([2, -1]),
            np.array([3, 1]) if optional else None,
            np.array([-1, 1, -1, -1, -1, -1]) if optional else None,
        ).to(traffic.CPU)
        rest = (trace, blocks) if optional else (None, None)
        torch.library.opcheck(torch.ops.sense.fold.default, pack_arguments(state, z, rows, table, *rest))


def test_a_compiled_fold_is_the_eager_one(oracle: Any, traffic: Any) -> None:
    torch.compiler.reset()
    table, z = oracle.table(), torch.randn(6, oracle.COLUMNS)
    rows = FoldRows(np.arange(6), traffic.row_codes(2, 6), np.array([0, 4, 6]), np.array([2, 0])).to(traffic.CPU)

    def step(state: State, z: Tensor, trace: Tensor) -> Tensor:
        fold(*state, z * 2, rows, table, trace)
        return state.peak.amax(1)

    eager, compiled = (([*table.new_state(3), torch.full((6, oracle.HEADS), 7.0)]) for _ in range(2))
    want = step(State(*eager[:3]), z, eager[3])
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(State(*compiled[:3]), z, compiled[3])
    traffic.assert_same_bits([*eager, want], [*compiled, got])
    assert (eager[3] != 7).any()


def test_a_lane_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="window of at least 1"):
        Lane(kind="rolling_mean_max", head=0, value=0)
    with pytest.raises(ValueError, match="query column"):
        Lane(kind="attention", head=0, value=0)
    with pytest.raises(ValueError, match="head 1 has lanes of 0 kinds"):
        LaneTable([Lane(kind="max", head=0, value=0)], 2)

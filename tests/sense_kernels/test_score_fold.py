"""A site scored and then folded: the kernels of a decode step and of a prefill, the CPU's path, a compiled step."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sense_kernels import (
    FoldRows,
    Lane,
    LaneTable,
    RowTensors,
    Scratch,
    State,
    fold_triton,
    new_scratch,
    pack_weight,
    score_fold,
    score_fold_torch,
    score_triton,
    split_weight,
)
from sense_kernels.testing import assert_close

# Rows past the last are all zeros, and untaken branches divide by 0: numpy warns of both inside the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
D, C, EPS = 600, 3, 1e-6
DTYPES = [torch.float32, torch.bfloat16]
Site = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def site(dtype: torch.dtype, mlp: bool = False) -> Site:
    """Return a site of 3 columns, the last of which is an MLP's with ``mlp``."""
    linear, hidden = (2, 6) if mlp else (3, 0)
    high, low = split_weight(pack_weight(torch.randn(D, linear + hidden) / D**0.5), dtype)
    return high, torch.randn(linear + hidden) / 2, torch.randn(hidden, int(mlp)) / 2, torch.randn(int(mlp)), low


def by_kernels(
    hidden: Tensor,
    packed: Site,
    eps: float,
    state: State,
    rows: RowTensors,
    table: LaneTable,
    logits: Tensor,
    residual: Tensor | None = None,
    trace: Tensor | None = None,
    blocks: State | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Do what ``score_fold`` does on a GPU."""
    weight, bias, mlp_weight, mlp_bias, low = packed
    score_triton(hidden, weight, bias, mlp_weight, mlp_bias, eps, logits, residual, low, *(scratch or (None, None)))
    fold_triton(*state, logits, rows, table, trace, blocks)


class Runner:
    """A function as ``traffic.feed`` wants it, that counts the steps of each shape."""

    def __init__(self, function: Any, packed: Site, traffic: Any = None) -> None:
        self._function, self._site, self._traffic = function, packed, traffic
        self.decode_steps = self.other_steps = 0

    def __call__(
        self, state: State, hidden: Tensor, rows: FoldRows, table: LaneTable, trace: Tensor, blocks: State | None = None
    ) -> None:
        named: FoldRows | RowTensors = rows
        if self._traffic is not None:
            named = self._traffic.step_rows(rows, len(hidden))
            decode = named.row is None  # type: ignore[union-attr]
            self.decode_steps, self.other_steps = self.decode_steps + decode, self.other_steps + (not decode)
        logits = torch.full((len(hidden), C), 9.0)
        self._function(hidden, self._site, EPS, state, named, table, logits, None, trace, blocks)


def requests(lengths: list[tuple[int, int]], traffic: Any, dtype: torch.dtype) -> Any:
    """Return requests of hidden states."""
    of = traffic.requests(lengths, D, scale=3.0)
    return [request._replace(rows_nX=request.rows_nX.to(dtype)) for request in of]


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_and_prefilled_tokens_leave_the_same_bits(dtype: torch.dtype, oracle: Any, traffic: Any) -> None:
    of, table, packed = requests([(4, 3), (2, 4)], traffic, dtype), oracle.table(), site(dtype, mlp=True)
    prefill = Runner(by_kernels, packed, traffic)
    want = traffic.feed(prefill, table, of, traffic.whole(of))
    assert prefill.decode_steps == 0
    for chunks, padding in ((traffic.one_by_one(of), 0), (traffic.prompt_then_steps(of), 0), ([[3, 4], [1, 5]], 2)):
        mixed = Runner(by_kernels, packed, traffic)
        traffic.assert_same_bits(traffic.feed(mixed, table, of, chunks, seed=2, padding=padding), want)
        assert (mixed.decode_steps > 2) == (padding == 0)
    twin = traffic.feed(Runner(score_fold_torch, packed), table, of, traffic.whole(of))
    for ref, tri in zip(twin, want, strict=True):
        assert_close(ref=ref, tri=tri, dtype=dtype)


@pytest.mark.parametrize("cut", ["one_by_one", "prompt_then_steps"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_cpu_the_chunks_hardly_matter(dtype: torch.dtype, cut: str, oracle: Any, traffic: Any) -> None:
    of = requests([(70, 9), (4, 17), (1, 1)], traffic, dtype)
    run, table = Runner(score_fold, site(dtype)), oracle.table()
    # The order in which BLAS sums 600 products depends on how many rows it is given.
    tolerance = 5e-6
    want = traffic.feed(run, table, of, traffic.whole(of))
    traffic.assert_same(traffic.feed(run, table, of, getattr(traffic, cut)(of), seed=2, padding=0), want, tolerance)
    alone = traffic.feed(run, table, of[1:2], [traffic.halves(of[1])])
    traffic.assert_same(alone[:3], [tensor[1:2] for tensor in want[:3]], tolerance)


def decode_step(requests: int, traffic: Any) -> tuple[RowTensors, Tensor]:
    """Return a step in which some requests have no slot, a rejected row, or end a block; and which rows are folded."""
    slot = torch.randperm(requests + 4)[:requests]
    slot[::7] = -1
    accepted = torch.ones(requests, dtype=torch.int64)
    accepted[1::5] = 0
    block = torch.full((requests,), -1)
    block[2::9] = torch.arange(len(block[2::9])).flip(0)
    codes = torch.from_numpy(np.resize(traffic.row_codes(3, 5), requests))
    return RowTensors(None, codes, None, slot, accepted, block), (slot >= 0) & (accepted > 0)


def run_step(function: Any, hidden: Tensor, packed: Site, rows: Any, table: LaneTable, **optional: Any) -> list[Tensor]:
    """Run one step on tables that have folded a row already; return all that it may write."""
    state, blocks = table.new_state(len(hidden) + 4), table.new_state(len(hidden))
    for tensor in (*state, *blocks):
        tensor.fill_(1)
    trace, logits = torch.full((len(hidden), table.heads), 7.0), torch.full((len(hidden) + 2, C + 3), 9.0)
    function(hidden, packed, EPS, state, rows, table, logits[:, 1 : 1 + C], trace=trace, blocks=blocks, **optional)
    return [*state, *blocks, trace, logits]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decode_step_of_several_tiles_is_the_twins(dtype: torch.dtype, oracle: Any, traffic: Any) -> None:
    hidden, residual = ((torch.randn(70, D) * 3).to(dtype) for _ in range(2))
    rows, folded = decode_step(70, traffic)
    packed, table, scratch = site(dtype, mlp=True), oracle.table(), new_scratch(D, 16, "cpu")
    scratch.partials.fill_(torch.nan)
    got = run_step(by_kernels, hidden, packed, rows, table, residual=residual, scratch=scratch)
    want = run_step(score_fold_torch, hidden, packed, FoldRows.of(rows), table, residual=residual)
    for ref, tri in zip(want, got, strict=True):
        assert_close(ref=ref, tri=tri, dtype=dtype)
    assert (scratch.tickets == 0).all()
    untouched = torch.ones(74, dtype=torch.bool)
    untouched[rows.slot[folded]] = False
    assert all((tensor[untouched] == 1).all() for tensor in got[:3])
    assert (got[6][~folded] == 7).all()
    assert (got[7][70:] == 9).all()
    assert (got[7][:, [0, 4, 5]] == 9).all()
    assert not (got[7][:70, 1:4] == 9).any()


@pytest.mark.parametrize("heads", [1, 65])
def test_any_number_of_heads_is_the_twins(heads: int, traffic: Any) -> None:
    lanes = [Lane(kind="attention", head=head, value=head % C, query=(head + 1) % C) for head in range(heads)]
    table, hidden, packed, (rows, _) = (
        LaneTable(lanes, heads),
        torch.randn(5, D),
        site(torch.float32),
        decode_step(5, traffic),
    )
    got = run_step(by_kernels, hidden, packed, rows, table)
    for ref, tri in zip(run_step(score_fold_torch, hidden, packed, FoldRows.of(rows), table), got, strict=True):
        assert_close(ref=ref, tri=tri, dtype=torch.float32)


def test_a_hidden_state_that_overflows_poisons_its_own_request(oracle: Any, traffic: Any) -> None:
    hidden, packed, (rows, _) = torch.randn(9, D), site(torch.float32, mlp=True), decode_step(9, traffic)
    rows = rows._replace(code=torch.full((9,), 15), accepted=None)
    clean = run_step(by_kernels, hidden, packed, rows, oracle.table())
    hidden[3, 5] = 1e25
    got = run_step(by_kernels, hidden, packed, rows, oracle.table())
    own = int(rows.slot[3])
    assert got[2][own].isnan().all()
    others = torch.arange(len(got[0])) != own
    traffic.assert_same_bits([x[others] for x in got[:3]], [x[others] for x in clean[:3]])


@pytest.mark.parametrize("function", [by_kernels, score_fold])
def test_no_requests_change_nothing(function: Any, oracle: Any) -> None:
    none = torch.empty(0, dtype=torch.int64)
    written = run_step(
        function, torch.zeros(0, D), site(torch.float32), RowTensors(None, none, None, none), oracle.table()
    )
    assert all((tensor == 1).all() for tensor in written[:3])
    assert (written[7] == 9).all()


@pytest.mark.parametrize("requests", [3, 5])
def test_a_decode_step_needs_a_row_for_each_request(requests: int, oracle: Any) -> None:
    rows = RowTensors(None, torch.full((requests,), 12), None, torch.arange(requests))
    with pytest.raises(ValueError, match=f"one row for each request, got 4 rows for {requests} requests"):
        run_step(score_fold, torch.randn(4, D), site(torch.float32), rows, oracle.table())


@pytest.mark.parametrize("decode", [False, True])
def test_a_compiled_step_is_the_eager_one(decode: bool, oracle: Any, traffic: Any) -> None:
    torch.compiler.reset()
    table, packed, hidden, (rows, _) = oracle.table(), site(torch.float32), torch.randn(6, D), decode_step(6, traffic)
    if not decode:
        rows = rows._replace(row=torch.arange(6), start=torch.arange(7))

    def step(hidden: Tensor, state: State, logits: Tensor, trace: Tensor) -> Tensor:
        score_fold(hidden * 2, packed, EPS, state, rows, table, logits, hidden, trace)
        return logits + 1

    eager, compiled = ([*table.new_state(10), torch.zeros(6, C), torch.full((6, oracle.HEADS), 7.0)] for _ in range(2))
    want = step(hidden, State(*eager[:3]), *eager[3:])
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, State(*compiled[:3]), *compiled[3:])
    traffic.assert_same([*compiled, got], [*eager, want])
    assert not (eager[4] == 7).all()
    assert (eager[1] > 0).any()


def test_tensors_and_host_arrays_are_one_step_on_the_cpu(oracle: Any, traffic: Any) -> None:
    hidden, packed, (rows, _) = torch.randn(9, D), site(torch.float32), decode_step(9, traffic)
    results = [run_step(score_fold, hidden, packed, given, oracle.table()) for given in (rows, FoldRows.of(rows))]
    traffic.assert_same_bits(*results)
    twin = run_step(score_fold_torch, hidden, packed, FoldRows.of(rows), oracle.table())
    for ref, tri in zip(twin, results[0], strict=True):
        assert_close(ref=ref, tri=tri, dtype=torch.float32)

"""Every address that a kernel reads or writes lies in a tensor that it was given: a GPU would not say so."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sense_kernels import (
    FoldRows,
    RowTensors,
    fold_triton,
    new_scratch,
    pack_weight,
    patch_rows_triton,
    score_triton,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
D, EPS = 600, 1e-6


def spans(argument: Any) -> Iterator[tuple[int, int]]:
    """Yield the first address of each tensor in the arguments of a launch, and the one past its last element."""
    if isinstance(argument, tuple):
        for item in argument:
            yield from spans(item)
    elif isinstance(argument, torch.Tensor) and argument.numel():
        steps = zip(argument.shape, argument.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        yield argument.data_ptr(), argument.data_ptr() + (last + 1) * argument.element_size()


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check the addresses of all loads and stores in Triton's interpreter."""
    from triton.runtime import interpreter

    given: list[tuple[int, int]] = []
    checked = [0]
    start: Callable[..., Any] = interpreter.GridExecutor._init_args_hst

    def launch(self: Any, arguments: Any, named: Any) -> Any:
        given[:] = spans((*arguments, *named.values()))
        return start(self, arguments, named)

    def bound(call: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def run(self: Any, pointers: Any, *rest: Any) -> Any:
            address = pointers.data[np.broadcast_to(rest[mask_at].data != 0, pointers.data.shape)]
            assert np.any([(address >= first) & (address < stop) for first, stop in given], axis=0).all()
            checked[0] += len(address)
            return call(self, pointers, *rest)

        return run

    builder: Any = interpreter.InterpreterBuilder
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", launch)
    monkeypatch.setattr(builder, "create_masked_load", bound(builder.create_masked_load, 0))
    monkeypatch.setattr(builder, "create_masked_store", bound(builder.create_masked_store, 1))
    yield
    assert checked[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [(3, 0, 0), (65, 100, 5)])
@pytest.mark.parametrize("rows", [1, 70])
def test_scoring_stays_in_bounds(rows: int, columns: tuple[int, int, int], dtype: torch.dtype) -> None:
    linear, units, mlp = columns
    high = pack_weight(torch.randn(D, linear + units)).to(dtype)
    rest = torch.randn(linear + units), torch.randn(units, mlp), torch.randn(mlp)
    hidden, low = torch.randn(rows, D).to(dtype), None if dtype == torch.float32 else high
    out, scratch = torch.empty(rows, linear + mlp), new_scratch(D, linear + units, "cpu")
    score_triton(hidden, high, *rest, EPS, out, hidden, low, *scratch)


@pytest.mark.parametrize("optional", [False, True])
def test_folding_stays_in_bounds(optional: bool, oracle: Any, traffic: Any) -> None:
    table = oracle.table()
    codes = np.concatenate([traffic.row_codes(3, 5), traffic.row_codes(2, 2), traffic.row_codes(1, 3)])
    rows = FoldRows(np.arange(10), codes, np.array([0, 5, 7, 10]), np.array([2, -1, 0]))
    trace, blocks = (torch.empty(10, oracle.HEADS), table.new_state(1)) if optional else (None, None)
    if optional:
        block = np.full(10, -1)
        block[4] = 0
        rows = replace(rows, accepted_B=np.array([5, 1, 2]), block_R=block)
    state, count, peak = table.new_state(3)
    fold_triton(state, count, peak, torch.randn(10, oracle.COLUMNS), rows.to(traffic.CPU), table, trace, blocks)


def test_a_decode_step_stays_in_bounds(oracle: Any) -> None:
    table = oracle.table()
    rows = RowTensors(None, torch.full((5,), 12), None, torch.tensor([3, -1, 0, 4, 1]))
    state, count, peak = table.new_state(5)
    logits, trace = torch.randn(5, oracle.COLUMNS), torch.empty(5, oracle.HEADS)
    fold_triton(state, count, peak, logits, rows, table, trace)


@pytest.mark.parametrize("clusters", [1, 17])
@pytest.mark.parametrize("rows", [1, 17])
def test_patching_stays_in_bounds(rows: int, clusters: int) -> None:
    output, hidden, vectors = torch.randn(rows, 100), torch.randn(rows, D), torch.randn(clusters, D)
    neuron, cluster = torch.randperm(100)[:70], torch.arange(70) % clusters
    patch_rows_triton(output, hidden, vectors, neuron, cluster, torch.arange(rows) % 3 / 2 + 0.5, 1.0)

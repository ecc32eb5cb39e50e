"""On an accelerator: every op against its twin, captured in a CUDA graph, and compiled."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

D, B = 1040, 6
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def site(dtype: torch.dtype, columns: int) -> tuple[Any, Any]:
    """Return the same packed probes for the GPU and, whole, for the twin on the CPU."""
    from sense_kernels import pack_weight, split_weight

    generator = torch.Generator().manual_seed(0)
    weight = pack_weight(torch.randn(D, columns, generator=generator) / D**0.5)
    bias, none = torch.randn(columns, generator=generator), (torch.empty(0, 0), torch.empty(0))
    high, low = split_weight(weight, dtype)
    on_gpu = (high.cuda(), bias.cuda(), *(x.cuda() for x in none), None if low is None else low.cuda())
    return on_gpu, (weight, bias, *none, None)


def table(device: str) -> Any:
    from sense_kernels import Lane, LaneTable

    kinds: list[dict[str, Any]] = [
        {"kind": "mean"},
        {"kind": "max"},
        {"kind": "ema_max", "param": 0.3, "window": 4},
        {"kind": "attention", "param": 0.7},
        {"kind": "cusum", "param": 0.2},
        {"kind": "rolling_mean_max", "window": 3},
        {"kind": "rolling_attention", "window": 5},
    ]
    lanes = [Lane(head=head, value=2 * head, query=2 * head + 1, **kind) for head, kind in enumerate(kinds)]
    return LaneTable(lanes, len(kinds), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 17, 130, 2100])
def test_score(rows: int, dtype: torch.dtype) -> None:
    from sense_kernels import score, score_torch

    hidden = torch.randn(rows, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    (weight, bias, mlp_weight, mlp_bias, low), whole = site(dtype, 14)
    out, want = torch.full((rows, 14), 9.0, device="cuda"), torch.empty(rows, 14)
    score(hidden.cuda(), weight, bias, mlp_weight, mlp_bias, 1e-6, out, None, low)
    weight, bias, mlp_weight, mlp_bias, _ = whole
    score_torch(hidden, weight, bias, mlp_weight, mlp_bias, 1e-6, want)
    torch.testing.assert_close(out.cpu(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def run(device: str, dtype: torch.dtype, steps: list[list[int]], graph: bool = False) -> list[Tensor]:
    """Score and fold steps of so many rows a request. Returns the state tables."""
    from sense_kernels import RESPONSE, WATCHED, FoldRows, RowTensors, new_scratch, score_fold

    generator = torch.Generator().manual_seed(2)
    lanes, packed = table(device), site(dtype, 14)[device == "cpu"]
    state = lanes.new_state(B + 2, device)
    scratch = new_scratch(D, 16, device)
    for lengths in steps:
        rows = sum(lengths)
        hidden = torch.randn(rows, D, generator=generator).to(dtype).to(device)
        logits = torch.empty(rows, 14, device=device)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        named: Any = FoldRows(np.arange(rows), np.full(rows, RESPONSE | WATCHED), starts, np.arange(len(lengths)))
        if device == "cuda" and set(lengths) == {1}:
            tensors = named.to(torch.device(device))
            named = RowTensors(None, tensors.code, None, tensors.slot)

        def step(hidden: Tensor = hidden, named: Any = named, logits: Tensor = logits) -> None:
            score_fold(hidden, packed, 1e-6, state, named, lanes, logits, scratch=scratch)

        if graph and isinstance(named, RowTensors):
            spare = lanes.new_state(B + 2, device)
            score_fold(hidden, packed, 1e-6, spare, named, lanes, logits, scratch=scratch)  # compiles
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                step()
            captured.replay()
        else:
            step()
    return [tensor.cpu() for tensor in state]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_fold(dtype: torch.dtype) -> None:
    steps = [[5, 9, 1, 30, 2, 7], *[[1] * B] * 8]
    for got, want in zip(run("cuda", dtype, steps), run("cpu", dtype, steps), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_a_captured_step_equals_a_launched_one() -> None:
    steps = [[1] * B] * 5
    for got, want in zip(
        run("cuda", torch.bfloat16, steps, graph=True), run("cuda", torch.bfloat16, steps), strict=True
    ):
        assert torch.equal(got, want)


def test_the_chunks_of_a_prompt_change_no_bit() -> None:
    from sense_kernels import RESPONSE, WATCHED, FoldRows, RowTensors, fold

    lanes, logits = table("cuda"), torch.randn(40, 14, generator=torch.Generator().manual_seed(5)).cuda()

    def chunked(*lengths: int) -> list[Tensor]:
        (state, count, peak), first = lanes.new_state(1, "cuda"), 0
        for n in lengths:
            codes = np.full(n, RESPONSE | WATCHED)
            rows: Any = FoldRows(np.arange(n), codes, np.array([0, n]), np.array([0]))
            if n == 1:
                tensors = rows.to(torch.device("cuda"))
                rows = RowTensors(None, tensors.code, None, tensors.slot)
            fold(state, count, peak, logits[first : first + n], rows, lanes)
            first += n
        return [state.cpu(), count.cpu(), peak.cpu()]

    whole = chunked(40)
    for pieces in (chunked(17, 3, 20), chunked(25, *[1] * 15)):
        assert all(torch.equal(got, want) for got, want in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    from sense_kernels import score

    hidden = torch.randn(2100, D, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    weight, bias, mlp_weight, mlp_bias, low = site(dtype, 14)[0]
    alone, together = (torch.empty(2100, 14, device="cuda") for _ in range(2))
    score(hidden[:17], weight, bias, mlp_weight, mlp_bias, 1e-6, alone, None, low)
    score(hidden, weight, bias, mlp_weight, mlp_bias, 1e-6, together, None, low)
    assert torch.equal(alone[:17], together[:17])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_rows(dtype: torch.dtype) -> None:
    from sense_kernels import patch_rows, patch_rows_torch

    generator = torch.Generator().manual_seed(3)
    output, hidden = (torch.randn(33, n, generator=generator).to(dtype) for n in (300, D))
    vectors, neuron = torch.randn(3, D, generator=generator) / D, torch.randperm(300, generator=generator)[:70]
    cluster, gate = torch.randint(0, 3, (70,), generator=generator), torch.arange(33) % 3 / 2
    got, want = output.cuda(), output.clone()
    patch_rows(got, *(x.cuda() for x in (hidden, vectors, neuron, cluster, gate)), 0.7)
    patch_rows_torch(want, hidden, vectors, neuron, cluster, gate, 0.7)
    assert torch.equal(got.cpu()[gate == 0], output[gate == 0])
    torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("int8", [False, True])
def test_match_signatures(int8: bool) -> None:
    from sense_kernels import match_signatures, match_signatures_torch, quantise_signatures

    generator = torch.Generator().manual_seed(4)
    query = torch.randn(130, 256, generator=generator)
    unit = torch.nn.functional.normalize(torch.randn(5000, 256, generator=generator), dim=1)
    bank, scale = quantise_signatures(unit) if int8 else (unit.bfloat16(), None)
    want, got = ((torch.empty(130), torch.empty(130, dtype=torch.int64)) for _ in range(2))
    match_signatures_torch(query, bank, scale, *want)
    on_gpu = tuple(x.cuda() for x in got)
    match_signatures(query.cuda(), bank.cuda(), None if scale is None else scale.cuda(), *on_gpu)
    torch.testing.assert_close(on_gpu[0].cpu(), want[0], rtol=1e-4, atol=1e-4)
    assert (on_gpu[1].cpu() == want[1]).float().mean() > 0.99


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_ops_are_kept() -> None:
    from sense_kernels import score

    weight, bias, mlp_weight, mlp_bias, low = site(torch.bfloat16, 14)[0]
    hidden = torch.randn(17, D).bfloat16().cuda()
    eager, compiled = (torch.zeros(17, 14, device="cuda") for _ in range(2))

    def step(hidden: Tensor, out: Tensor) -> None:
        score(hidden, weight, bias, mlp_weight, mlp_bias, 1e-6, out, None, low)

    step(hidden, eager)
    torch.compile(step, fullgraph=True)(hidden, compiled)
    assert torch.equal(compiled, eager)

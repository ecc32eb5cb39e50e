"""Scoring and steering ops against plain formulas, and under ``torch.compile``."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sense_kernels import Scratch, pack_weight, score, score_torch, split_weight, steer, steer_torch
from sense_kernels.score import numpy_rows

D, K, M, J, EPS = 24, 3, 6, 2, 1e-6


def weights(mlp: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    if mlp:
        return torch.randn(D, K + M), torch.randn(K + M), torch.randn(M, J), torch.randn(J)
    return torch.randn(D, K), torch.randn(K), torch.empty(0, 0), torch.empty(0)


def plain(hidden_TD: Tensor, packed: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Say the formula row by row in float64."""
    weight, bias, mlp_weight, mlp_bias = (tensor.double() for tensor in packed)
    rows = []
    for x_D in hidden_TD.double():
        y = (x_D / (x_D.square().mean() + EPS).sqrt()) @ weight + bias
        tail = y[K:].relu() @ mlp_weight + mlp_bias if len(mlp_weight) else y[K:]
        rows.append(torch.cat((y[:K], tail)))
    return torch.stack(rows).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("function", [score, score_torch])
def test_score_is_the_formula(function: Any, mlp: bool, dtype: torch.dtype) -> None:
    packed, hidden = weights(mlp), (torch.randn(2, 5, D) * 7).to(dtype)
    out = torch.full((12, K + (J if mlp else 0)), 9.0)
    assert function(hidden, *packed, EPS, out) is None
    torch.testing.assert_close(out[:10], plain(hidden.reshape(-1, D).float(), packed), rtol=1e-5, atol=1e-5)
    assert (out[10:] == 9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("function", [score, score_torch])
def test_the_residual_is_added_and_rounded_to_the_hidden_dtype(function: Any, mlp: bool, dtype: torch.dtype) -> None:
    packed, hidden, residual = weights(mlp), (torch.randn(2, 5, D) * 7).to(dtype), torch.randn(2, 5, D).to(dtype)
    out = torch.full((12, K + (J if mlp else 0)), 9.0)
    function(hidden, *packed, EPS, out, residual)
    summed = (hidden.float() + residual.float()).reshape(-1, D)
    torch.testing.assert_close(out[:10], plain(summed.to(dtype).float(), packed), rtol=1e-5, atol=1e-5)
    assert (out[10:] == 9).all()
    unrounded = (out[:10] - plain(summed, packed)).abs().max()
    assert (unrounded > 1e-3) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("function", [score, score_torch])
def test_padded_and_split_weights_score_as_whole_ones(function: Any, mlp: bool) -> None:
    weight, *rest = weights(mlp)
    hidden = torch.randn(5, D).bfloat16()
    whole, padded, split = (torch.full((6, K + (J if mlp else 0)), 9.0) for _ in range(3))
    function(hidden, weight, *rest, EPS, whole)
    function(hidden, pack_weight(weight), *rest, EPS, padded)
    high, low = split_weight(pack_weight(weight), torch.bfloat16)
    function(hidden, high, *rest, EPS, split, weight_low=low)
    torch.testing.assert_close(padded, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(split[:, :K], whole[:, :K], rtol=2**-15, atol=2**-15)
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3)
    assert not split.equal(whole)


def test_a_weight_is_packed_to_whole_tiles_and_split_where_its_range_allows() -> None:
    weight = torch.randn(D, 17)
    packed = pack_weight(weight)
    assert (packed.shape, packed.dtype, packed.is_contiguous()) == ((D, 32), torch.float32, True)
    assert packed[:, :17].equal(weight)
    assert (packed[:, 17:] == 0).all()
    assert split_weight(packed, torch.float32) == (packed, None)
    assert split_weight(packed * 1e6, torch.float16)[1] is None
    assert split_weight(packed * 1e-6, torch.float16)[1] is None
    high, low = split_weight(packed, torch.float16)
    assert low is not None
    assert (high.dtype, low.dtype) == (torch.float16, torch.float16)
    assert ((high.float() + low.float() - packed).abs() <= packed.abs().amax(0) * 2**-16).all()


@pytest.mark.parametrize("function", [score, score_torch])
def test_a_row_does_not_depend_on_how_many_rows_there_are(function: Any) -> None:
    weight, bias, *none = weights(False)
    hidden, whole = torch.randn(100, D), torch.zeros(100, K)
    function(hidden, pack_weight(weight), bias, *none, EPS, whole)
    for rows in (1, 7, 60):
        some = torch.zeros(rows, K)
        function(hidden[:rows], pack_weight(weight), bias, *none, EPS, some)
        torch.testing.assert_close(some, whole[:rows], rtol=1e-6, atol=1e-6)


def test_the_mlp_columns_may_stand_alone() -> None:
    weight, bias, mlp_weight, mlp_bias = weights(True)
    hidden, out = torch.randn(4, D), torch.zeros(4, J)
    score(hidden, weight[:, K:].contiguous(), bias[K:], mlp_weight, mlp_bias, EPS, out)
    whole = torch.zeros(4, K + J)
    score(hidden, weight, bias, mlp_weight, mlp_bias, EPS, whole)
    torch.testing.assert_close(out, whole[:, K:])


@pytest.mark.parametrize("mlp", [False, True])
def test_an_empty_input_writes_nothing(mlp: bool) -> None:
    packed = weights(mlp)
    out = torch.full((3, K + (J if mlp else 0)), 9.0)
    for shape in ((0, D), (2, 0, D)):
        score(torch.zeros(shape), *packed, EPS, out)
        assert (out == 9).all()
        assert steer(torch.zeros(shape), torch.ones(4), torch.ones(D)).shape == shape


def test_a_row_does_not_depend_on_its_batch_mates_scale() -> None:
    packed, hidden = weights(False), torch.randn(6, D)
    out, scaled = torch.zeros(6, K), torch.zeros(6, K)
    score(hidden, *packed, EPS, out)
    factor = torch.tensor([1.0, 0.5, 1e4, 1.0, 300.0, 1.0])[:, None]
    score(hidden * factor, *packed, EPS, scaled)
    torch.testing.assert_close(scaled, out, rtol=1e-5, atol=1e-5)
    assert torch.equal(scaled[[0, 3, 5]], out[[0, 3, 5]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e25])
def test_what_cannot_be_normalised_is_not_a_plausible_logit(bad: float) -> None:
    packed, hidden = weights(True), torch.randn(3, D)
    hidden[1, 4] = bad
    out = torch.zeros(3, K + J)
    score(hidden, *packed, EPS, out)
    assert not out[1].isfinite().any()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [steer, steer_torch])
def test_steer_moves_chosen_rows_and_no_others(function: Any, dtype: torch.dtype) -> None:
    hidden, vector = torch.randn(2, 3, D).to(dtype), torch.randn(D)
    strength = torch.tensor([0.0, 2.0, 0.0, -1.5, 0.0, 0.0, 7.0])
    moved = function(hidden, strength, vector)
    want = (hidden.float() + strength[:6].view(2, 3, 1) * vector).to(dtype)
    still = strength[:6].view(2, 3) == 0
    assert moved.dtype == dtype
    assert torch.equal(moved, want)
    assert torch.equal(moved[still], hidden[still])
    assert not torch.equal(moved[~still], hidden[~still])


def test_a_row_at_rest_stays_bit_identical_even_where_the_vector_is_not_finite() -> None:
    hidden = torch.tensor([[-0.0, float("nan")], [1.0, 2.0]])
    moved = steer(hidden, torch.tensor([0.0, 1.0]), torch.tensor([float("inf"), 0.0]))
    assert torch.equal(moved[0].view(torch.int32), hidden[0].view(torch.int32))


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
def test_the_ops_are_registered_as_they_behave(mlp: bool, optional: bool) -> None:
    packed = weights(mlp)
    out = torch.zeros(8, 2 * (K + J))[:, : K + (J if mlp else 0)]
    scratch = Scratch(torch.empty(1, 64, 32), torch.zeros(1, dtype=torch.int32))
    for hidden in (torch.randn(2, 3, D), torch.randn(4, D).bfloat16(), torch.randn(0, D)):
        high, low = split_weight(packed[0], torch.bfloat16)
        given = (
            (hidden, high, *packed[1:], EPS, out, hidden * 2, low, *scratch)
            if optional
            else (hidden, *packed, EPS, out)
        )
        torch.library.opcheck(torch.ops.sense.score.default, given)
        torch.library.opcheck(torch.ops.sense.steer.default, (hidden, torch.rand(9), torch.rand(D)))
    transposed = torch.randn(D, 4).T
    torch.library.opcheck(torch.ops.sense.steer.default, (transposed, torch.rand(9), torch.rand(D)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_scores_are_written_and_equal_the_eager_ones(backend: str) -> None:
    torch.compiler.reset()
    packed, hidden, strength, vector = weights(True), torch.randn(4, D), torch.tensor([0.0, 1, 0, 1]), torch.randn(D)
    high, low = split_weight(packed[0], torch.bfloat16)

    def step(hidden: Tensor, out: Tensor) -> Tensor:
        score(hidden, *packed, EPS, out[:, 1:])
        moved = steer(hidden, strength, vector)
        score(moved, high, *packed[1:], EPS, out[4:, 1:], hidden, low)
        return torch.add(moved, 1)

    eager, compiled = torch.full((9, 1 + K + J), 9.0), torch.full((9, 1 + K + J), 9.0)
    want = step(hidden, eager)
    got = torch.compile(step, backend=backend, fullgraph=True)(hidden, compiled)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled, eager)
    assert (compiled[:8, 1:] != 9).all()
    assert (compiled[8] == 9).all()
    assert (compiled[:, 0] == 9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [511, 512, 600])
def test_many_rows_score_alike_on_either_side_of_the_switch_to_another_product(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 2 * 576, generator=generator).to(dtype)[:, ::2]
    hidden[3], hidden[5], hidden[7, 1] = 0.0, 1e25, torch.nan
    weight, bias = pack_weight(torch.randn(576, 10, generator=generator)), torch.randn(10, generator=generator)
    none = torch.empty(0)
    outs = [torch.full((rows + 1, 10), 7.0) for _ in range(2)]
    for run, out in zip((score, score_torch), outs, strict=True):
        run(hidden, weight, bias, none[:, None], none, 1e-6, out)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=3e-5, equal_nan=True)
    assert outs[0][[5, 7]].isnan().all()
    assert outs[0][3].equal(bias)
    assert (outs[0][rows] == 7).all()


def test_few_rows_go_through_numpy_as_long_as_it_needs_no_threads() -> None:
    assert (numpy_rows(24, 16), numpy_rows(576, 16), numpy_rows(8192, 64)) == (64, 28, 0)
    weight, bias = torch.randn(576, 16) / 24, torch.randn(16)
    mlp_weight, mlp_bias = torch.empty(0, 0), torch.empty(0)
    hidden, few, many = torch.randn(29, 576), torch.empty(28, 16), torch.empty(29, 16)
    score(hidden[:28], weight, bias, mlp_weight, mlp_bias, EPS, few)
    score(hidden, weight, bias, mlp_weight, mlp_bias, EPS, many)
    torch.testing.assert_close(many[:28], few, rtol=5e-6, atol=5e-6)

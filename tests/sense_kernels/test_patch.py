"""Patching of neurons: the kernel in Triton's interpreter, its twin and the CPU path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sense_kernels import patch_rows, patch_rows_torch, patch_rows_triton
from sense_kernels.testing import ROWS, assert_close

F = 150
TWIN: Callable[..., None] = patch_rows_torch
KERNEL: Callable[..., None] = patch_rows_triton
RUNS: dict[str, Callable[..., None]] = {"kernel": KERNEL, "op": patch_rows}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Masked loads are multiplied like others: numpy warns of the overflow in rows that are not patched.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def case(rows: int, width: int, clusters: int, neurons: int, dtype: torch.dtype) -> Case:
    """Return output, hidden, vectors, neuron, cluster and gate; about half of the rows are gated."""
    generator = torch.Generator().manual_seed(rows * width)
    output, hidden = (torch.randn(rows, n, generator=generator).to(dtype) for n in (F, width))
    vectors = torch.randn(clusters, width, generator=generator) / width**0.5
    neuron = torch.randperm(F, generator=generator)[:neurons]
    cluster = torch.randint(0, clusters, (neurons,), generator=generator)
    gate = torch.rand(rows + 3, generator=generator) * (torch.rand(rows + 3, generator=generator) > 0.5)
    return output, hidden, vectors, neuron, cluster, gate


def plain(of: Case, alpha: float) -> Tensor:
    """Say the formula element by element in float64."""
    output, hidden, vectors, neuron, cluster, gate = of
    want = output.double()
    for t in range(len(hidden)):
        for n, k in zip(neuron.tolist(), cluster.tolist(), strict=True):
            want[t, n] += gate[t].double() * alpha * (hidden[t].double() @ vectors[k].double())
    return want.to(output.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clusters", [1, 3, 17])
@pytest.mark.parametrize("width", [60, 576])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_patched_rows_are_the_twins_and_the_others_keep_their_bits(
    run: Callable[..., None], rows: int, width: int, clusters: int, dtype: torch.dtype
) -> None:
    output, *rest = of = case(rows, width, clusters, 70, dtype)
    ref, tri = output.clone(), output.clone()
    TWIN(ref, *rest, 0.7)
    run(tri, *rest, 0.7)
    # One rounding to the dtype on either side may fall differently.
    torch.testing.assert_close(tri, ref)
    if dtype == torch.float32:
        assert_close(ref=ref, tri=tri, dtype=dtype)
    still = of[5][:rows] == 0
    assert torch.equal(tri[still], output[still])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("strided", [False, True])
def test_a_gate_that_is_open_for_every_row(run: Callable[..., None], strided: bool) -> None:
    output, *rest, gate = case(17, 60, 3, 70, torch.float32)
    ref, gate[:] = output.clone(), 0.5
    place = torch.zeros(17, 2 * F)[:, :F] if strided else torch.empty_like(output)
    place.copy_(output)
    TWIN(ref, *rest, gate, 0.7)
    run(place, *rest, gate, 0.7)
    torch.testing.assert_close(place, ref)


@pytest.mark.parametrize("run", [*RUNS.values(), TWIN], ids=[*RUNS, "twin"])
def test_a_gate_that_is_too_short_is_refused(run: Callable[..., None]) -> None:
    output, *rest, gate = case(6, 60, 2, 5, torch.float32)
    with pytest.raises(ValueError, match="do not fit one another"):
        run(output, *rest, gate[:4], 1.0)


def test_the_twin_is_the_formula() -> None:
    output, *rest = of = case(17, 60, 3, 70, torch.float32)
    want = plain(of, 0.7)
    TWIN(output, *rest, 0.7)
    torch.testing.assert_close(output, want)


@pytest.mark.parametrize("run", [*RUNS.values(), TWIN], ids=[*RUNS, "twin"])
def test_a_resting_row_is_not_even_read(run: Callable[..., None]) -> None:
    output, hidden, vectors, neuron, cluster, _ = case(4, 60, 2, 5, torch.float32)
    hidden[1], output[1, neuron[0]] = torch.nan, -0.0
    before = output.clone()
    run(output, hidden, vectors, neuron, cluster, torch.tensor([0.0, 0.0, 1.0, 0.0]), 1.0)
    assert torch.equal(output[[0, 1, 3]].view(torch.int32), before[[0, 1, 3]].view(torch.int32))
    assert not torch.equal(output[2], before[2])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_an_empty_input_and_a_patch_without_neurons_change_nothing(run: Callable[..., None]) -> None:
    for rows, neurons in ((0, 5), (4, 0)):
        output, *rest = case(rows, 60, 2, neurons, torch.float32)
        before = output.clone()
        run(output, *rest, 1.0)
        assert torch.equal(output, before)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_slice_of_a_fused_projection_is_patched_in_place(run: Callable[..., None]) -> None:
    output, *rest = case(17, 60, 2, 9, torch.float32)
    wide = torch.full((17, F + 8), 9.0)
    wide[:, 4 : 4 + F] = output
    run(wide[:, 4 : 4 + F], *rest, 0.7)
    TWIN(output, *rest, 0.7)
    torch.testing.assert_close(wide[:, 4 : 4 + F], output)
    assert (wide[:, :4] == 9).all()
    assert (wide[:, 4 + F :] == 9).all()


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    output, hidden, *rest, gate = case(130, 576, 3, 70, torch.float32)
    together = output.clone()
    KERNEL(together, hidden, *rest, gate, 0.7)
    for start in (0, 33, 129):
        alone = output[start : start + 1].clone()
        KERNEL(alone, hidden[start : start + 1], *rest, gate[start:], 0.7)
        assert torch.equal(alone[0], together[start])


def test_the_op_is_registered_as_it_behaves_and_survives_compilation() -> None:
    output, *rest = case(5, 60, 2, 9, torch.float32)
    torch.library.opcheck(torch.ops.sense.patch_rows.default, (output.clone(), *rest, 0.7))
    eager, compiled = output.clone(), output.clone()

    def step(output: Tensor, hidden: Tensor) -> Tensor:
        patch_rows(output, hidden, *rest[1:], 0.7)
        return output + 1

    want = step(eager, rest[0])
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(compiled, rest[0])
    assert torch.equal(got, want)
    assert torch.equal(compiled, eager)

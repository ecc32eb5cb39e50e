"""The scoring kernel in Triton's interpreter: close to its twin, and the same bits however a row is launched.

Shape letters: T packed rows, D width, K linear columns, M hidden units, J their columns.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sense_kernels import Scratch, _score_kernel, new_scratch, pack_weight, score_torch, score_triton, split_weight
from sense_kernels.launch import ScoreLaunch, score_launch
from sense_kernels.testing import COLUMNS, ROWS, WIDTHS, assert_close

# Rows past the last are all zeros, and some tests feed infinities: numpy warns of both inside the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


class Case(NamedTuple):
    """A site and its hidden states."""

    hidden: Tensor
    site: tuple[Tensor, Tensor, Tensor, Tensor]
    low: Tensor | None
    columns: int

    def run(self, function: Any, hidden: Tensor | None = None, **optional: Tensor | None) -> Tensor:
        """Score into a slice of a wider buffer that holds 9s, check that only the slice was written, and return it."""
        hidden = self.hidden if hidden is None else hidden
        rows = math.prod(hidden.shape[:-1])
        wide = torch.full((rows + 2, self.columns + 5), 9.0)
        out = wide[:, 2 : 2 + self.columns]
        function(hidden, *self.site, EPS, out, weight_low=self.low, **optional)
        logits = out[:rows].clone()
        out[:rows] = 9.0
        assert (wide == 9).all()
        return logits


def case(rows: int, width: int, dtype: torch.dtype, linear: int, hidden: int = 0, mlp: int = 0) -> Case:
    weight = pack_weight(torch.randn(width, linear + hidden) * 2 / width**0.5)
    high, low = split_weight(weight, dtype)
    assert (low is None) == (dtype == torch.float32)
    second = torch.randn(hidden, mlp) / max(hidden, 1) ** 0.5, torch.randn(mlp)
    return Case(
        (torch.randn(rows, width) * 3).to(dtype), (high, torch.randn(linear + hidden), *second), low, linear + mlp
    )


def mlp_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Hidden units that begin in the middle of a column tile and go over two, that stand alone, and a small site."""
    yield case(17, 576, dtype, 65, 100, 5)
    yield case(17, 60, dtype, 0, 150, 1)
    yield case(70, 60, dtype, 3, 6, 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_size_is_the_twins(width: int, dtype: torch.dtype) -> None:
    for rows, columns in product(ROWS, COLUMNS):
        given = case(rows, width, dtype, columns)
        assert_close(ref=given.run(score_torch), tri=given.run(score_triton), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_second_stage_is_the_twins(dtype: torch.dtype) -> None:
    for given in mlp_cases(dtype):
        assert_close(ref=given.run(score_torch), tri=given.run(score_triton), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_columns_than_a_tile_are_the_twins(dtype: torch.dtype) -> None:
    given = case(5, 600, dtype, 200)
    assert_close(ref=given.run(score_torch), tri=given.run(score_triton), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_may_lie_anyhow_in_memory(dtype: torch.dtype) -> None:
    given = case(6, 60, dtype, 3)
    want = given.run(score_triton)
    sliced = torch.full((2, 3, 100), torch.nan, dtype=dtype)[..., 20:80].copy_(given.hidden.view(2, 3, 60))
    every_second = torch.full((12, 60), torch.nan, dtype=dtype)[::2].copy_(given.hidden)
    transposed = torch.empty(60, 6, dtype=dtype).T.copy_(given.hidden)
    for hidden in (sliced, every_second, transposed):
        assert given.run(score_triton, hidden).equal(want)
        half = (given.hidden * 0.5).view(hidden.shape)
        assert given.run(score_triton, half, residual=hidden * 0.5).equal(want)
        assert_close(ref=given.run(score_torch, hidden), tri=want, dtype=dtype)


@pytest.mark.parametrize("shape", [(0, 60), (2, 0, 60)])
def test_no_rows_write_nothing_and_take_no_ticket(shape: tuple[int, ...]) -> None:
    given, scratch = case(1, 60, torch.float32, 3), new_scratch(60, 3, "cpu")
    assert len(given.run(score_triton, torch.zeros(shape), **scratch._asdict())) == 0
    assert (scratch.tickets == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_added_and_rounded_as_the_engine_does(dtype: torch.dtype) -> None:
    given = case(17, 576, dtype, 3)
    residual = (torch.randn(17, 576) * 5).to(dtype)
    summed = given.hidden.float() + residual.float()
    got = given.run(score_triton, residual=residual)
    assert_close(ref=given.run(score_torch, residual=residual), tri=got, dtype=dtype)
    assert got.equal(given.run(score_triton, summed.to(dtype)))
    if dtype != torch.float32:
        unrounded = Case(summed, given.site, given.low, given.columns).run(score_torch)
        assert (got - unrounded).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_holds_no_memory_of_what_went_before(dtype: torch.dtype) -> None:
    given = case(70, 600, dtype, 3, 6, 2)
    want = given.run(score_triton)
    scratch = new_scratch(1300, 40, "cpu")
    scratch.partials.fill_(torch.nan)
    for _ in range(2):
        assert given.run(score_triton, **scratch._asdict()).equal(want)
        assert (scratch.tickets == 0).all()
    assert not scratch.partials.isnan().all()


def one_after_another(*arguments: Any) -> ScoreLaunch:
    """Return the settings with which no number of rows is small enough to run segments side by side."""
    return score_launch(*arguments)._replace(split_rows=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_give_the_same_bits_side_by_side_and_in_turn(dtype: torch.dtype, monkeypatch: Any) -> None:
    cases = [case(17, width, dtype, *columns) for width in (576, 1300) for columns in ((3,), (65, 100, 5))]
    residual = [torch.randn_like(given.hidden) for given in cases]
    wants = [given.run(score_triton, residual=r) for given, r in zip(cases, residual, strict=True)]
    monkeypatch.setattr(_score_kernel, "score_launch", one_after_another)
    unused = Scratch(torch.full((3, 64, 300), torch.nan), torch.full((1,), 5, dtype=torch.int32))
    for given, r, want in zip(cases, residual, wants, strict=True):
        assert given.run(score_triton, residual=r, **unused._asdict()).equal(want)
    assert (unused.tickets == 5).all()
    assert unused.partials.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [(3,), (65, 100, 5)])
def test_a_row_depends_neither_on_its_batch_mates_nor_on_its_place(
    columns: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = case(70, 600, dtype, *columns)
    want = given.run(score_triton)
    order = torch.randperm(70)
    assert given.run(score_triton, given.hidden[order]).equal(want[order])
    for row in (0, 37, 69):
        assert given.run(score_triton, given.hidden[row, None]).equal(want[row, None])
    mates = given.hidden * 100
    mates[5], mates[66] = given.hidden[5], given.hidden[66]
    mates[6] = torch.nan
    assert given.run(score_triton, mates)[[5, 66]].equal(want[[5, 66]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be_normalised_is_not_a_plausible_logit(dtype: torch.dtype, bad: float) -> None:
    given = case(3, 600, dtype, 3, 6, 2)
    want = given.run(score_triton)
    given.hidden[1, 4] = bad
    got = given.run(score_triton)
    assert not got[1].isfinite().any()
    assert got[[0, 2]].equal(want[[0, 2]])


def test_a_sum_with_the_residual_that_overflows_is_not_a_plausible_logit() -> None:
    given = case(3, 60, torch.float16, 3)
    given.hidden[1, 4] = 60000
    got = given.run(score_triton, residual=torch.full((3, 60), 60000 / 2).half())
    assert not got[1].isfinite().any()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_column_spoils_no_other(bad: float) -> None:
    given = case(17, 60, torch.float32, 3, 6, 2)
    want = given.run(score_triton)
    given.site[1][1] = bad
    got = given.run(score_triton)
    assert not got[:, 1].isfinite().any()
    assert got[:, [0, 2, 3, 4]].equal(want[:, [0, 2, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_split_weights_give_the_logits_of_whole_ones(dtype: torch.dtype) -> None:
    hidden, weight = (torch.randn(64, 576) * 3).to(dtype), pack_weight(torch.randn(576, 65) / 24)
    rest = torch.zeros(65), torch.empty(0, 0), torch.empty(0)
    high, low = split_weight(weight, dtype)
    whole, split, halved = (
        Case(hidden, (given, *rest), rest_of, 65).run(score_triton)
        for given, rest_of in ((weight, None), (high, low), (high, torch.zeros_like(high)))
    )
    for logits, close in ((split, True), (halved, False)):
        error = (logits - whole).abs() / whole.abs().clamp(min=1)
        assert bool(error.max() <= 2**-15) == close


def test_a_weight_out_of_the_dtypes_range_stays_whole() -> None:
    weight = pack_weight(torch.randn(60, 3) * 1e6)
    assert split_weight(weight, torch.float16) == (weight, None)
    hidden, rest = (torch.randn(5, 60) * 3).half(), (torch.zeros(3), torch.empty(0, 0), torch.empty(0))
    given = Case(hidden, (weight, *rest), None, 3)
    assert_close(ref=given.run(score_torch), tri=given.run(score_triton), dtype=torch.float16)


def test_split_weights_also_score_hidden_states_of_another_dtype() -> None:
    given = case(5, 60, torch.bfloat16, 3)
    hidden = torch.randn(5, 60)
    assert_close(ref=given.run(score_torch, hidden), tri=given.run(score_triton, hidden), dtype=torch.float32)

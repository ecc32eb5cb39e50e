"""Search among signatures: the kernel in Triton's interpreter, its twin and the CPU path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sense_kernels import (
    match_signatures,
    match_signatures_torch,
    match_signatures_triton,
    new_match_scratch,
    quantise_signatures,
)
from sense_kernels.testing import ROWS, assert_close

RUNS = {"kernel": match_signatures_triton, "op": match_signatures}
# A query of NaN is multiplied like any other before it is marked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def bank(count: int, width: int, int8: bool) -> tuple[Tensor, Tensor | None]:
    unit = normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(count)), dim=1)
    return quantise_signatures(unit) if int8 else (unit.bfloat16(), None)


def queries(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))).to(dtype)


def search(run: Callable[..., None], query: Tensor, of: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return cosines and indices, after checking that what was there is overwritten."""
    best, index = torch.full((len(query),), 9.0), torch.full((len(query),), 99)
    run(query, *of, best, index)
    return best, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("count", "width"), [(1, 60), (333, 100), (1000, 256)])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_best_is_the_twins(
    run: Callable[..., None], rows: int, count: int, width: int, int8: bool, dtype: torch.dtype
) -> None:
    query, of = queries(rows, width, dtype), bank(count, width, int8)
    (want, where), (got, at) = (search(each, query, of) for each in (match_signatures_torch, run))
    assert_close(ref=want, tri=got, dtype=dtype)
    assert torch.equal(at, where)


def test_the_twin_finds_a_planted_signature_and_its_cosine() -> None:
    unit = normalize(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    other = normalize(torch.randn(1, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    query = 5 * (unit[[7, 49]] + 0.2 * other)
    best, index = search(match_signatures_torch, query, (unit.bfloat16(), None))
    assert index.tolist() == [7, 49]
    want = torch.nn.functional.cosine_similarity(query, unit[[7, 49]].bfloat16().float())
    torch.testing.assert_close(best, want, rtol=1e-3, atol=1e-3)


def test_int8_loses_little() -> None:
    unit = normalize(torch.randn(200, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    quantised, scale = quantise_signatures(unit)
    assert (quantised.float() * scale[:, None] - unit).abs().max() <= scale.max() / 2 + 1e-7
    assert quantise_signatures(torch.zeros(1, 4))[0].tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("run", [*RUNS.values(), match_signatures_torch], ids=[*RUNS, "twin"])
def test_a_query_without_direction_matches_nothing(run: Callable[..., None]) -> None:
    query = queries(6, 60)
    query[1], query[2, 3], query[4, 0] = 0.0, torch.nan, torch.inf
    best, index = search(run, query, bank(333, 60, False))
    assert best.isnan().tolist() == [False, True, True, False, True, False]
    assert (index == -1).tolist() == best.isnan().tolist()


@pytest.mark.parametrize("run", [*RUNS.values(), match_signatures_torch], ids=[*RUNS, "twin"])
def test_an_empty_bank_matches_nothing_and_an_empty_batch_asks_nothing(run: Callable[..., None]) -> None:
    best, index = search(run, queries(3, 60), bank(0, 60, False))
    assert best.tolist() == [-torch.inf] * 3
    assert index.tolist() == [-1] * 3
    assert search(run, queries(3, 60)[:0], bank(5, 60, False))[0].shape == (0,)


@pytest.mark.parametrize("run", [*RUNS.values(), match_signatures_torch], ids=[*RUNS, "twin"])
def test_of_equal_signatures_the_first_is_named(run: Callable[..., None]) -> None:
    # Far enough apart to lie in different blocks, programs and chunks.
    signatures, _ = bank(9000, 60, False)
    signatures[8999] = signatures[4500] = signatures[200] = signatures[130]
    best, index = search(run, signatures[[130]].float(), (signatures, None))
    assert index.tolist() == [130]
    torch.testing.assert_close(best, torch.ones(1), rtol=2e-3, atol=0)


def test_scratch_memory_may_hold_anything_and_tickets_are_set_back() -> None:
    query, of = queries(130, 100), bank(1000, 100, False)
    scratch = new_match_scratch(130, "cpu")
    scratch.best.fill_(torch.nan)
    scratch.place.fill_(-7)
    want, _ = search(match_signatures_torch, query, of)
    for _ in range(2):
        got, at = torch.empty(130), torch.empty(130, dtype=torch.int64)
        match_signatures_triton(query, *of, got, at, *scratch)
        assert_close(ref=want, tri=got, dtype=torch.float32)
        assert not scratch.tickets.any()


def test_a_query_does_not_depend_on_the_others_nor_on_its_layout() -> None:
    query, of = queries(130, 100), bank(1000, 100, True)
    together = search(match_signatures_triton, query, of)
    wide = torch.randn(130, 120)
    wide[:, 7:107] = query
    for rows in (slice(0, 1), slice(64, 67), slice(129, 130)):
        for alone in (query[rows], wide[rows, 7:107], query[rows].T.contiguous().T):
            best, index = search(match_signatures_triton, alone, of)
            assert torch.equal(best, together[0][rows])
            assert torch.equal(index, together[1][rows])


def test_the_op_is_registered_as_it_behaves_and_survives_compilation() -> None:
    query, (signatures, scale) = queries(5, 60), bank(333, 60, True)
    best, index = torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    torch.library.opcheck(torch.ops.sense.match_signatures.default, (query, signatures, scale, best, index))

    def step(query: Tensor, best: Tensor, index: Tensor) -> Tensor:
        match_signatures(query, signatures, scale, best, index)
        return best + 1

    want = step(query, best, index)
    fresh = torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(query, *fresh)
    assert torch.equal(got, want)
    assert torch.equal(fresh[1], index)

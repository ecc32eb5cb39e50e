"""What does not fit is refused before a kernel would read or write past it, or score with part of a probe."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sense_kernels import (
    RESPONSE,
    FoldRows,
    HostSites,
    Lane,
    LaneTable,
    Scratch,
    fold,
    fold_triton,
    match_signatures_triton,
    new_match_scratch,
    new_scratch,
    pack_weight,
    patch_rows_triton,
    score,
    score_triton,
)
from sense_kernels.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
D, K, NONE = 1300, 3, (torch.empty(0, 0), torch.empty(0))
WEIGHT, BIAS = pack_weight(torch.ones(D, K)), torch.zeros(K)
RUNS: list[Callable[..., None]] = [score, score_triton]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("width", [D - 20, D + 20])
def test_hidden_states_of_another_width_are_not_scored(run: Callable[..., None], width: int) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        run(torch.ones(4, width), WEIGHT, BIAS, *NONE, 1e-6, torch.zeros(4, K))


@pytest.mark.parametrize("run", RUNS)
def test_more_rows_than_the_output_holds_are_refused(run: Callable[..., None]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        run(torch.ones(5, D), WEIGHT, BIAS, *NONE, 1e-6, torch.zeros(4, K))


def test_a_residual_or_scratch_that_does_not_fit_is_refused() -> None:
    hidden, out = torch.ones(4, D), torch.zeros(4, K)
    with pytest.raises(ValueError, match=r"residual \[3, 1300\]"):
        score_triton(hidden, WEIGHT, BIAS, *NONE, 1e-6, out, residual=torch.ones(3, D))
    with pytest.raises(ValueError, match="do not fit"):
        score_triton(hidden, WEIGHT, BIAS, *NONE, 1e-6, torch.zeros(K, 4).T)
    whole = new_scratch(D, K, "cpu")
    for partials in (whole.partials[:2], whole.partials[:, :3], whole.partials[:, :, :16]):
        with pytest.raises(ValueError, match="too small for 4 rows and 16 columns"):
            score_triton(hidden, WEIGHT, BIAS, *NONE, 1e-6, out, None, None, partials, whole.tickets)
    with pytest.raises(ValueError, match="too small"):
        score_triton(hidden, WEIGHT, BIAS, *NONE, 1e-6, out, None, None, whole.partials, whole.tickets[:0])
    score_triton(hidden, WEIGHT, BIAS, *NONE, 1e-6, out, None, None, *whole)
    assert_close(ref=torch.full((4, K), float(D)), tri=out, dtype=torch.float32)


def test_tables_that_are_not_contiguous_are_refused() -> None:
    table = LaneTable([Lane(kind="attention", head=0, value=0, query=1)], 1)
    state = table.new_state(4)
    steps = FoldRows(np.array([0]), np.array([RESPONSE]), np.array([0, 1]), np.array([0])).to(torch.device("cpu"))
    for bad in (state._replace(state=torch.zeros(3, 4).T), state._replace(counts=torch.zeros(1, 8).long()[:, ::2].T)):
        with pytest.raises(ValueError, match="contiguous"):
            fold_triton(*bad, torch.zeros(1, 2), steps, table)
    with pytest.raises(ValueError, match="columns of stride 1"):
        fold_triton(*state, torch.zeros(2, 3).T, steps, table)


def test_a_patch_that_does_not_fit_is_refused_and_a_strided_one_is_not() -> None:
    output, hidden, vectors = torch.zeros(4, 9), torch.ones(4, 60), torch.ones(2, 60)
    neuron, cluster, gate = torch.tensor([1, 5]), torch.tensor([0, 1]), torch.ones(4)
    for bad in (
        (output, hidden[:, :50], vectors, gate),
        (output, hidden, vectors, gate[:3]),
        (output[:3], hidden, vectors, gate),
        (torch.zeros(9, 4).T, hidden, vectors, gate),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            patch_rows_triton(bad[0], bad[1], bad[2], neuron, cluster, bad[3], 1.0)
    assert not output.any()
    neuron, gate = torch.tensor([1, 0, 5, 0])[::2], torch.ones(8)[::2]
    patch_rows_triton(output, torch.ones(60, 4).T, torch.ones(60, 2).T, neuron, cluster, gate, 1.0)
    assert (output[:, [1, 5]] == 60).all()


def test_a_search_that_does_not_fit_is_refused_and_a_strided_bank_is_not() -> None:
    query, bank = torch.randn(3, 60), torch.randn(40, 80).bfloat16()
    best, index = torch.empty(3), torch.empty(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"signatures \[40, 80\]"):
        match_signatures_triton(query, bank, None, best, index)
    with pytest.raises(ValueError, match="not contiguous"):
        match_signatures_triton(query, bank[:, :60], None, torch.empty(6)[::2], index)
    scratch = new_match_scratch(3, "cpu")
    with pytest.raises(ValueError, match="too small for 3 queries"):
        match_signatures_triton(query, bank[:, :60], None, best, index, scratch.best[:2], *scratch[1:])
    match_signatures_triton(query, bank[:, :60], None, best, index)
    products = query @ bank[:, :60].float().T
    assert index.tolist() == products.argmax(1).tolist()


def test_a_row_past_the_logits_is_an_error_and_not_another_requests_row() -> None:
    table = LaneTable([Lane(kind="max", head=0, value=0)], 1)
    rows = FoldRows(np.array([3, 4]), np.array([RESPONSE, RESPONSE]), np.array([0, 1, 2]), np.array([0, 1]))
    with pytest.raises(IndexError):
        fold(*table.new_state(2), torch.zeros(4, 1), rows, table)


def test_a_site_takes_no_hidden_states_of_twice_its_width() -> None:
    host = HostSites([pack_weight(torch.ones(60, 2))], [torch.zeros(2)], 1e-6)
    with pytest.raises(RuntimeError, match="must match the existing size"):
        host.put(0, torch.ones(4, 120))


def test_the_scratch_of_a_wide_site_serves_a_narrow_one() -> None:
    scratch: Scratch = new_scratch(2000, 100, "cpu")
    out = torch.zeros(4, K)
    score_triton(torch.ones(4, D), WEIGHT, BIAS, *NONE, 1e-6, out, None, None, *scratch)
    assert_close(ref=torch.full((4, K), float(D)), tri=out, dtype=torch.float32)

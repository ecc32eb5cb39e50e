"""Sites batched on the CPU: what one scores alone, whichever of them were put."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from sense_kernels import HostSites, pack_weight, score

D, EPS, ROWS = 24, 1e-6, 8
COLUMNS = (3, 17, 1)


class Bank(NamedTuple):
    """Three sites, and buffers that hold 9s."""

    sites: HostSites
    weights: list[Tensor]
    biases: list[Tensor]
    whole: Tensor
    out: tuple[Tensor, ...]

    def want(self, site: int, hidden: Tensor) -> Tensor:
        """Score one site alone."""
        logits, none = torch.empty(hidden.numel() // D, COLUMNS[site]), torch.empty(0)
        score(hidden, self.weights[site], self.biases[site], none[:, None], none, EPS, logits)
        return logits


def make_bank(dtype: torch.dtype) -> Bank:
    weights = [pack_weight(torch.randn(D, columns)) for columns in COLUMNS]
    biases = [torch.randn(columns) for columns in COLUMNS]
    whole = torch.full((ROWS + 2, sum(COLUMNS)), 9.0)
    return Bank(
        HostSites(weights, biases, EPS, dtype, rows=ROWS + 2, few=ROWS), weights, biases, whole, whole.split(COLUMNS, 1)
    )


@pytest.fixture
def bank() -> Bank:
    return make_bank(torch.float32)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, ROWS])
def test_all_sites_are_what_each_scores_alone(rows: int, dtype: torch.dtype) -> None:
    bank = make_bank(dtype)
    for _ in range(2):
        hidden = [(torch.randn(rows, D) * 5).to(dtype) for _ in COLUMNS]
        for site in (2, 0, 1):
            bank.sites.put(site, hidden[site])
        bank.sites.write(bank.out, bank.whole)
        for site, given in enumerate(hidden):
            close(bank.out[site][:rows], bank.want(site, given))
    assert (bank.whole[rows:] == 9).all()


def test_hidden_states_may_have_leading_dimensions_and_holes(bank: Bank) -> None:
    hidden = torch.randn(2, 3, D + 7)[..., :D]
    for site in range(3):
        bank.sites.put(site, hidden)
    bank.sites.write(bank.out, bank.whole)
    for site in range(3):
        close(bank.out[site][:6], bank.want(site, hidden))


def test_a_site_that_was_not_put_is_not_written(bank: Bank) -> None:
    hidden = torch.randn(4, D)
    for site in range(3):
        bank.sites.put(site, torch.randn(4, D))
    bank.sites.write(bank.out, torch.empty_like(bank.whole))
    bank.sites.put(1, hidden)
    bank.sites.write(bank.out, bank.whole)
    assert (bank.out[0] == 9).all()
    assert (bank.out[2] == 9).all()
    close(bank.out[1][:4], bank.want(1, hidden))
    assert (bank.out[1][4:] == 9).all()


def test_sites_may_differ_in_rows(bank: Bank) -> None:
    hidden = [torch.randn(rows, D) for rows in (2, 5, 0)]
    for site, given in enumerate(hidden):
        bank.sites.put(site, given)
    bank.sites.write(bank.out, bank.whole)
    for site, given in enumerate(hidden):
        close(bank.out[site][: len(given)], bank.want(site, given))
        assert (bank.out[site][len(given) :] == 9).all()


def test_what_was_written_or_dropped_is_not_written_again(bank: Bank) -> None:
    for site in range(3):
        bank.sites.put(site, torch.randn(2, D))
    bank.sites.drop()
    bank.sites.write(bank.out, bank.whole)
    assert (bank.whole == 9).all()
    bank.sites.put(0, torch.randn(2, D))
    bank.sites.write(bank.out, bank.whole)
    bank.whole.fill_(9.0)
    bank.sites.write(bank.out, bank.whole)
    assert (bank.whole == 9).all()


def test_the_last_hidden_states_put_count(bank: Bank) -> None:
    hidden = torch.randn(2, D)
    for site in (0, 1, 2, 1):
        bank.sites.put(site, torch.randn(3, D))
    for site in range(3):
        bank.sites.put(site, hidden)
    bank.sites.write(bank.out, bank.whole)
    close(bank.out[1][:2], bank.want(1, hidden))
    assert (bank.whole[2:] == 9).all()


@pytest.mark.parametrize("sites", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
def test_what_cannot_be_normalised_is_not_a_plausible_logit(bad: float, sites: tuple[int, ...], bank: Bank) -> None:
    hidden = torch.randn(3, D)
    hidden[1, 4] = bad
    for site in sites:
        bank.sites.put(site, hidden)
    bank.sites.write(bank.out, bank.whole)
    for site in sites:
        assert bank.out[site][1].isnan().all()
        assert bank.out[site][[0, 2]].isfinite().all()
        assert not (bank.out[site][[0, 2]] == 9).any()


def test_more_rows_than_the_buffer_holds_are_refused(bank: Bank) -> None:
    with pytest.raises(RuntimeError, match="must match the existing size"):
        bank.sites.put(0, torch.randn(ROWS + 3, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_a_graph_puts_few_rows_and_many(residual: bool, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    bank = make_bank(dtype)

    def step(hidden: Tensor, more: Tensor | None) -> Tensor:
        for site in range(3):
            bank.sites.put(site, hidden[site], more)
        return hidden + 1

    compiled = torch.compile(step, backend="inductor", fullgraph=True, dynamic=True)
    for rows in (2, ROWS, ROWS + 2, 5):
        hidden, more = torch.randn(3, rows, D).to(dtype), torch.randn(rows, D).to(dtype)
        bank.whole.fill_(9.0)
        torch.testing.assert_close(compiled(hidden, more if residual else None), hidden + 1)
        assert (bank.whole == 9).all()
        bank.sites.write(bank.out, bank.whole)
        for site in range(3):
            close(bank.out[site][:rows], bank.want(site, hidden[site] + more if residual else hidden[site]))
        assert (bank.whole[rows:] == 9).all()


def test_a_graph_writes_into_the_buffer_and_not_into_a_copy_of_it(bank: Bank) -> None:
    torch.compiler.reset()

    def step(hidden: Tensor) -> Tensor:
        bank.sites.put(1, hidden, hidden)
        return hidden * 2

    hidden, whole = torch.randn(4, D), f"({ROWS + 2}, {D})"
    torch._dynamo.mark_dynamic(hidden, 0)
    _, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), hidden)
    assert whole in code
    assert f"empty_strided_cpu({whole}" not in code

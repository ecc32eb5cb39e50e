"""The bank: many probes packed per site give what each gives alone, and a silent tap gives NaN."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sense_kernels import LaneTable
from spider_sense.scoring import Bank, Probe
from spider_sense.scoring.bank import EPS
from spider_sense.types import Site

ROWS = 7


@pytest.fixture
def probes(guards: Any) -> tuple[Probe, ...]:
    """Linear and MLP probes, on one to three sites, that meet at the same sites in mixed order."""
    return (
        guards.probe("mlp_first", "mean", "resid.0", seed=1, mlp=True),
        guards.probe("attention", "attention", "resid.0", "mlp_in.1", seed=2, parts=2),
        guards.probe("mlp_parts", "multimax", "mlp_in.1", seed=3, mlp=True, parts=3),
        guards.probe("everywhere", "max", "resid.0", "resid.1", "mlp_in.1", seed=4),
        guards.probe("mlp_sites", "mean", "mlp_in.1", "resid.1", seed=5, mlp=True),
    )


@pytest.fixture
def hidden() -> dict[Site, Tensor]:
    torch.manual_seed(0)
    return {Site.parse(site): torch.randn(ROWS, 32) * 9 for site in ("resid.0", "resid.1", "mlp_in.1")}


def alone(probe: Probe, hidden: dict[Site, Tensor]) -> Tensor:
    """Return a probe's logits [T, columns], straight from the definition."""
    total = torch.zeros(ROWS, probe.aggregator.columns)
    for site, item in probe.maps.items():
        x = hidden[site] / (hidden[site].square().mean(-1, keepdim=True) + EPS).sqrt()
        y = x @ item.weight + item.bias
        if item.mlp_weight is not None and item.mlp_bias is not None:
            y = y.relu() @ item.mlp_weight + item.mlp_bias
        total += y
    return total


def run(bank: Bank, hidden: dict[Site, Tensor], silent: str = "") -> Tensor:
    bank.begin(ROWS)
    for site, hidden_TD in hidden.items():
        if str(site) != silent:
            bank.tap(site)(hidden_TD)
    return bank.logits(ROWS)


def test_each_probe_gets_its_own_logits(probes: tuple[Probe, ...], hidden: dict[Site, Tensor]) -> None:
    for order in (probes, probes[::-1], probes[2:] + probes[:2]):
        bank = Bank(order)
        logits = run(bank, hidden)
        assert logits.shape == (ROWS, bank.columns) == (ROWS, 1 + 4 + 3 + 1 + 1)
        for probe in order:
            torch.testing.assert_close(
                logits[:, bank.columns_of(probe)], alone(probe, hidden), rtol=1e-5, atol=1e-5, msg=probe.name
            )


@pytest.mark.parametrize("silent", ["resid.0", "resid.1", "mlp_in.1"])
def test_a_tap_that_did_not_run_leaves_nan_in_the_heads_that_read_it(
    probes: tuple[Probe, ...], hidden: dict[Site, Tensor], silent: str
) -> None:
    bank = Bank(probes)
    run(bank, hidden)
    logits = run(bank, hidden, silent)
    for probe in probes:
        columns = logits[:, bank.columns_of(probe)]
        if Site.parse(silent) in probe.maps:
            assert columns.isnan().all(), probe.name
        else:
            torch.testing.assert_close(columns, alone(probe, hidden), rtol=1e-5, atol=1e-5)


def test_a_tap_that_saw_fewer_rows_leaves_nan_in_the_others(
    probes: tuple[Probe, ...], hidden: dict[Site, Tensor]
) -> None:
    bank = Bank(probes)
    run(bank, hidden)
    logits = run(bank, {site: hidden_TD[:4] for site, hidden_TD in hidden.items()})
    assert logits[:4].isfinite().all()
    assert logits[4:].isnan().all()


def test_the_buffer_grows_with_the_batch_and_taps_follow(probes: tuple[Probe, ...], hidden: dict[Site, Tensor]) -> None:
    bank = Bank(probes, rows=2)
    taps = {site: bank.tap(site) for site in bank.sites}
    for rows in (2, 7, 3, 40, 1):
        bank.begin(rows)
        for site, tap in taps.items():
            tap(hidden[site].repeat(6, 1)[:rows])
        logits = bank.logits(rows)
        assert logits.shape[0] == rows
        for probe in probes:
            want = alone(probe, hidden).repeat(6, 1)[:rows]
            torch.testing.assert_close(logits[:, bank.columns_of(probe)], want, rtol=1e-5, atol=1e-5)


def test_a_compiled_tap_writes_into_a_buffer_that_has_grown(
    probes: tuple[Probe, ...], hidden: dict[Site, Tensor]
) -> None:
    torch.compiler.reset()
    bank = Bank(probes, rows=2)
    taps = {site: torch.compile(bank.tap(site), backend="aot_eager", fullgraph=True) for site in bank.sites}
    for rows in (2, 7, 3):
        bank.begin(rows)
        for site, tap in taps.items():
            tap(hidden[site][:rows])
        for probe in probes:
            want = alone(probe, hidden)[:rows]
            torch.testing.assert_close(bank.logits(rows)[:, bank.columns_of(probe)], want, rtol=1e-5, atol=1e-5)


def test_logits_of_a_step_outlive_the_next(probes: tuple[Probe, ...], hidden: dict[Site, Tensor]) -> None:
    bank = Bank(probes)
    logits = run(bank, hidden)
    before = logits.clone()
    bank.begin(ROWS)
    assert torch.equal(logits, before)


def test_the_lane_table_has_a_head_for_each_probe(probes: tuple[Probe, ...]) -> None:
    bank = Bank(probes)
    assert isinstance(bank.table, LaneTable)
    assert bank.table.heads == len(probes)
    assert bank.sites == tuple(sorted(bank.sites))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_taps_go_on_with_the_probes_that_replace_others(
    probes: tuple[Probe, ...], hidden: dict[Site, Tensor], compiled: bool, linear: bool
) -> None:
    if linear:  # a CPU scores these together
        probes = (probes[1], probes[3])
    bank, others = Bank(probes), tuple(halved(probe) for probe in probes)
    taps = {site: torch.compile(bank.tap(site), backend="eager") if compiled else bank.tap(site) for site in hidden}

    def score() -> Tensor:
        bank.begin(ROWS)
        for site, hidden_TD in hidden.items():
            taps[site](hidden_TD)
        return bank.logits(ROWS).clone()

    before = score()
    bank.exchange(others)
    torch.testing.assert_close(score(), run(Bank(others), hidden))
    assert not torch.equal(score(), before)
    with pytest.raises(ValueError, match="write other columns"):
        bank.exchange(probes[:-1])
    torch.testing.assert_close(score(), run(Bank(others), hidden))
    bank.exchange(probes)
    assert torch.equal(score(), before)


def halved(probe: Probe) -> Probe:
    """Return a probe of the same shapes that says half as much."""
    maps = {
        site: replace(item, weight=item.weight / 2, bias=item.bias + 1, mlp_bias=item.mlp_bias)
        for site, item in probe.maps.items()
    }
    return replace(probe, maps=maps)


def test_two_probes_of_one_name_are_refused(probes: tuple[Probe, ...]) -> None:
    with pytest.raises(ValueError, match="names of their own"):
        Bank([probes[0], replace(probes[3], name=probes[0].name)])


def test_a_probe_with_columns_that_its_aggregator_does_not_read_is_refused(guards: Any) -> None:
    probe = guards.probe("attention", "attention", "resid.0", parts=2)
    with pytest.raises(ValueError, match=r"'attention' has 4 columns at resid\.0; its mean aggregator reads 1"):
        replace(probe, aggregator=guards.probe("mean", "mean", "resid.0").aggregator)

from typing import Any

import pytest
import torch

from spider_sense.reporting.contribution import contributions, meaning
from spider_sense.scoring import Aggregator, Bank, Probe, Scorer, SiteMap
from spider_sense.types import Site


def readout(aggregator: Aggregator, logits_nC: torch.Tensor) -> float:
    columns = aggregator.columns
    maps = {Site.parse("resid.0"): SiteMap(torch.zeros(4, columns), torch.zeros(columns))}
    scorer = Scorer(Bank([Probe("a", "made", aggregator, maps)]))
    _, trace_TH = scorer.score_sequence(logits_nC, scorer.open("a", len(logits_nC), 0, 0))
    return float(trace_TH[-1, 0])


@pytest.mark.parametrize("options", [{"kind": "attention", "parts": 3}, {"kind": "softmax", "temperature": 2.0}])
def test_shares_add_up_to_the_readout(options: dict[str, Any]) -> None:
    aggregator = Aggregator(**options)
    logits_nC = torch.randn(11, aggregator.columns, generator=torch.Generator().manual_seed(1))
    _, share_n = contributions(aggregator, logits_nC)
    assert float(share_n.sum()) == pytest.approx(readout(aggregator, logits_nC), abs=1e-5)
    assert share_n.abs().max() > 0.01


def test_rolling_attention_weighs_a_token_in_its_own_window() -> None:
    aggregator = Aggregator(kind="rolling_attention", parts=2, window=3)
    logits_nC = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    _, share_n = contributions(aggregator, logits_nC)
    for token in range(6):
        window_wC = logits_nC[max(0, token - 2) : token + 1]
        expected = (window_wC[:, :2].softmax(0)[-1] * window_wC[-1, 2:]).sum()
        assert float(share_n[token]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"kind": "mean"}, {"kind": "attention", "parts": 2}, {"kind": "multimax", "parts": 2}]
)
def test_the_token_logit_is_the_readout_of_the_token_alone(options: dict[str, Any]) -> None:
    aggregator = Aggregator(**options)
    logits_nC = torch.randn(1, aggregator.columns, generator=torch.Generator().manual_seed(3))
    logit_n, contribution_n = contributions(aggregator, logits_nC)
    assert float(logit_n[0]) == pytest.approx(readout(aggregator, logits_nC), abs=1e-6)
    assert float(contribution_n[0]) == pytest.approx(float(logit_n[0]), abs=1e-6)


def test_the_meaning_tells_shares_from_logits() -> None:
    assert "adds to the readout" in meaning(Aggregator(kind="attention"))
    assert "alone" in meaning(Aggregator(kind="max"))

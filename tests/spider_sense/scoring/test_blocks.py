"""States of KV blocks: a request that starts after a cached prefix scores as if it had computed it."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spider_sense.scoring import Aggregator, Bank, BlockStates, Probe, Request, RequestRows, Scorer, SiteMap, TokenChain
from spider_sense.types import Site

KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "mean"},
    {"kind": "attention", "parts": 2},
    {"kind": "ema_max"},
    {"kind": "max", "span": "tail"},
    {"kind": "rolling_mean_max", "window": 3, "span": "response"},
    {"kind": "rolling_attention", "window": 4},
    {"kind": "cusum"},
)
SIZE, BLOCKS, SKIP, TAIL = 4, 32, 2, 2


def new_scorer(kinds: tuple[dict[str, Any], ...] = KINDS) -> Scorer:
    probes = []
    for index, options in enumerate(kinds):
        aggregator = Aggregator(**options)
        site_map = SiteMap(torch.zeros(4, aggregator.columns), torch.zeros(aggregator.columns))
        probes.append(Probe(f"p{index}", "none", aggregator, {Site.parse("resid.0"): site_map}))
    bank = Bank(probes)
    return Scorer(bank, BlockStates(bank.table, BLOCKS, SIZE))


class Conversation:
    """A request with its tokens, its blocks and the logits that the model would give at each position."""

    def __init__(self, what: Scorer, tokens: list[int], prompt: int, blocks: list[int], seed: str = "guard") -> None:
        self.what, self.tokens, self.blocks = what, tokens, blocks
        self.request: Request = what.open("r", prompt, SKIP, TAIL)
        self.chain = TokenChain(seed, SIZE)

    def run(self, first: int, last: int) -> None:
        """Compute positions, whose logits depend on the tokens up to each and on nothing else."""
        assert self.what.blocks is not None
        positions = np.arange(first, last)
        ends = self.what.blocks.ends(
            positions,
            self.request.prompt_length,
            self.blocks,
            self.tokens,
            self.chain,
            self.request.coverage.missing == 0 and first <= self.request.position,
        )
        rows = RequestRows(self.request, np.arange(last - first), positions, ends)
        self.what.step(torch.stack([logit(self.tokens[: p + 1], self.what) for p in positions]), [rows])

    def lend(self, cached: int) -> bool:
        assert self.what.blocks is not None
        known = self.what.blocks.lend(
            self.what.stream,
            self.request.slot,
            cached,
            self.request.prompt_length,
            TAIL,
            self.blocks,
            self.tokens,
            self.chain,
        )
        if known:
            self.request.position = self.request.cached = cached
        return known

    @property
    def peak(self) -> Tensor:
        return self.what.peak([self.request])[0]


def logit(tokens: list[int], what: Scorer) -> Tensor:
    draw = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
    return torch.randn(what.bank.columns, generator=draw) * 3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(6, 20), st.integers(1, 6), st.integers(17, 20))
def test_a_hit_equals_a_cold_run(seed: int, hit: int, first_prompt: int, cut: int, prompt: int) -> None:
    """The first request's blocks hold prompt, tail and response; the second begins with some of them."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 50, 30).tolist()
    what, cold = new_scorer(), new_scorer()
    first = Conversation(what, tokens, first_prompt, list(range(8)))
    for start in range(0, 24, cut):
        first.run(start, min(start + cut, 24))
    cached = hit * SIZE
    again = tokens[:cached] + draw.integers(0, 50, 30).tolist()
    second = Conversation(what, again, prompt, [*range(hit), *range(10, 20)])
    within_tail = cached > prompt - TAIL
    assert second.lend(cached) is (not within_tail or prompt == first_prompt)
    if second.request.position == 0:
        return
    second.run(cached, 27)
    whole = Conversation(cold, again, prompt, list(range(8)))
    whole.run(0, 27)
    torch.testing.assert_close(second.peak, whole.peak, rtol=1e-6, atol=1e-6)
    assert second.request.coverage.cached == cached
    assert second.request.coverage.missing == 0
    # What the second request filled is as good as what the first one did.
    third = Conversation(what, again, prompt, [*range(hit), *range(10, 20)])
    assert third.lend(16)
    third.run(16, 27)
    torch.testing.assert_close(third.peak, whole.peak, rtol=1e-6, atol=1e-6)


def test_a_block_with_other_tokens_or_another_seed_lends_nothing() -> None:
    what = new_scorer()
    first = Conversation(what, list(range(20)), 12, list(range(5)))
    first.run(0, 16)
    before = what.stream.readout([first.request.slot])
    other_tokens = [*range(7), 99, *range(8, 20)]
    for tokens, seed, cached in (
        (other_tokens, "guard", 8),
        (list(range(20)), "another", 8),
        (list(range(20)), "guard", 20),
    ):
        request = Conversation(what, tokens, 18, list(range(5)), seed)
        assert not request.lend(cached)
        assert torch.isneginf(request.peak).all()
    assert not Conversation(what, list(range(20)), 18, list(range(5))).lend(6), "not at the end of a block"
    assert Conversation(what, list(range(20)), 18, list(range(5))).lend(8)
    assert what.stream.readout([first.request.slot]).equal(before)


def test_blocks_of_an_incomplete_request_lend_nothing() -> None:
    what = new_scorer()
    first = Conversation(what, list(range(20)), 12, list(range(5)))
    first.run(4, 16)
    assert first.request.coverage.missing == 4
    assert not Conversation(what, list(range(20)), 18, list(range(5))).lend(8)


@pytest.mark.parametrize(("cached", "known"), [(8, True), (12, False)])
def test_a_head_over_the_prompt_alone_takes_no_generated_tokens(cached: int, known: bool) -> None:
    what = new_scorer(({"kind": "mean", "span": "prompt"}, {"kind": "max"}))
    Conversation(what, list(range(20)), 8, list(range(5))).run(0, 16)
    assert Conversation(what, list(range(20)), 18, list(range(5))).lend(cached) is known

"""The scorer: positions seen twice, holes, skipped heads, and streams against whole sequences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sense_kernels import PROMPT, RESPONSE, TAIL, WATCHED
from spider_sense.scoring import Aggregator, Bank, Probe, Request, RequestRows, Scorer, SiteMap
from spider_sense.types import Coverage, Site

KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "mean"},
    {"kind": "attention", "parts": 2},
    {"kind": "ema_max"},
    {"kind": "softmax", "span": "prompt"},
    {"kind": "max", "span": "tail"},
    {"kind": "rolling_mean_max", "window": 3, "span": "response"},
    {"kind": "rolling_attention", "window": 4},
    {"kind": "cusum"},
)
LENGTH, PROMPT_LENGTH, SKIP, TAIL_LENGTH = 14, 9, 2, 3


def scorer() -> Scorer:
    probes = []
    for index, options in enumerate(KINDS):
        aggregator = Aggregator(**options)
        site_map = SiteMap(torch.zeros(4, aggregator.columns), torch.zeros(aggregator.columns))
        probes.append(Probe(f"p{index}", "none", aggregator, {Site.parse("resid.0"): site_map}))
    return Scorer(Bank(probes))


def opened(what: Scorer) -> Request:
    return what.open("r", PROMPT_LENGTH, SKIP, TAIL_LENGTH)


def give(what: Scorer, request: Request, logits_TC: Tensor, positions: Sequence[int]) -> None:
    """Fold the rows of some absolute positions."""
    index = np.array(positions, dtype=np.int64)
    what.step(logits_TC[index], [RequestRows(request, np.arange(len(index)), index)])


def logits(seed: int = 0) -> Tensor:
    columns = sum(Aggregator(**options).columns for options in KINDS)
    return torch.randn(LENGTH, columns, generator=torch.Generator().manual_seed(seed)) * 3


def whole(logits_TC: Tensor) -> Tensor:
    what = scorer()
    return what.score_sequence(logits_TC, opened(what))[0]


def test_codes_say_what_a_position_is() -> None:
    code = opened(scorer()).codes(np.arange(12)).tolist()
    tail, reply = PROMPT | TAIL, RESPONSE | WATCHED
    assert code == [0, 0, *[PROMPT] * 4, tail, tail, tail | WATCHED, reply, reply, reply]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.lists(st.integers(1, 5), min_size=14, max_size=14))
def test_steps_of_any_size_equal_the_whole_sequence(seed: int, sizes: list[int]) -> None:
    values, what = logits(seed), scorer()
    request, start = opened(what), 0
    for size in sizes:
        give(what, request, values, range(start, min(start + size, LENGTH)))
        start = min(start + size, LENGTH)
    torch.testing.assert_close(what.peak([request])[0], whole(values), rtol=1e-5, atol=1e-5)
    assert request.coverage == Coverage(scored=LENGTH)


def test_decoding_several_requests_at_once_equals_their_whole_sequences() -> None:
    values, what = [logits(seed) for seed in range(3)], scorer()
    requests = [opened(what) for _ in values]
    for request, logits_TC in zip(requests, values, strict=True):
        give(what, request, logits_TC, range(PROMPT_LENGTH))
    for position in range(PROMPT_LENGTH, LENGTH):
        turn = [(place + position) % 3 for place in range(3)]  # as an engine reorders its batch
        # Rows between them are others'.
        logits_TC = torch.full((6, values[0].shape[1]), torch.nan)
        logits_TC[1::2] = torch.stack([values[place][position] for place in turn])
        what.decode(logits_TC, np.array([1, 3, 5]), [requests[place] for place in turn], None)
    for request, logits_TC in zip(requests, values, strict=True):
        torch.testing.assert_close(what.peak([request])[0], whole(logits_TC), rtol=1e-5, atol=1e-5)
        assert request.coverage == Coverage(scored=LENGTH)
        assert request.position == LENGTH


def test_the_trace_is_the_readout_after_each_token() -> None:
    values, what, token_by_token = logits(), scorer(), scorer()
    request, other = opened(what), opened(token_by_token)
    peak, trace = what.score_sequence(values, request)
    assert trace[: PROMPT_LENGTH - 1].isnan().all()
    for position in range(LENGTH):
        give(token_by_token, other, values, [position])
        if position >= PROMPT_LENGTH - 1:
            readout = token_by_token.stream.readout([other.slot])[0]
            torch.testing.assert_close(trace[position], readout, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peak, trace[PROMPT_LENGTH - 1 :].amax(0))


def test_a_sequence_may_be_scored_in_parts() -> None:
    values, what = logits(), scorer()
    request = opened(what)
    what.score_sequence(values[:6], request)
    peak, trace = what.score_sequence(values[6:], request)
    torch.testing.assert_close(peak, whole(values), rtol=1e-5, atol=1e-5)
    assert trace.shape[0] == LENGTH - 6


def test_positions_that_come_again_are_dropped() -> None:
    values, what = logits(), scorer()
    request = opened(what)
    give(what, request, values, range(10))
    # The request was preempted: what is computed again has other numbers, and must not count twice.
    give(what, request, values + 100, range(10))
    give(what, request, torch.cat((values[:10] * torch.nan, values[10:])), range(7, LENGTH))
    torch.testing.assert_close(what.peak([request])[0], whole(values), rtol=1e-5, atol=1e-5)
    assert request.coverage == Coverage(scored=LENGTH)
    assert request.position == LENGTH


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ([range(3, LENGTH)], 3),
        ([range(5), range(8, LENGTH)], 3),
        ([[0, 1, 4, 5, 9], range(10, LENGTH)], 5),
        ([range(5), [], range(5, LENGTH)], 0),
        ([range(2), range(4, 6), range(3), range(9, LENGTH)], 5),
    ],
)
def test_positions_that_were_passed_over_are_missing(steps: list[Sequence[int]], missing: int) -> None:
    values, what = logits(), scorer()
    request = opened(what)
    for positions in steps:
        give(what, request, values, positions)
    assert request.coverage == Coverage(scored=LENGTH - missing, missing=missing)
    assert not request.coverage.complete or missing == 0


def test_what_is_missing_stays_missing_when_it_comes_late() -> None:
    values, what = logits(), scorer()
    request = opened(what)
    give(what, request, values, range(6, 9))
    before = what.stream.readout([request.slot])
    give(what, request, values, range(6))
    assert request.coverage == Coverage(scored=3, missing=6)
    assert torch.equal(what.stream.readout([request.slot]), before)


def test_skipped_rows_count_as_scored_and_never_touch_the_state() -> None:
    values, what = logits(), scorer()
    request = opened(what)
    tables = what.stream._state, what.stream._count, what.stream._peak
    before = [table.clone() for table in tables]
    give(what, request, values * torch.nan, range(SKIP))
    assert all(map(torch.equal, tables, before))
    assert request.coverage == Coverage(scored=SKIP)
    poisoned = values.clone()
    poisoned[:SKIP] = torch.nan
    assert torch.equal(whole(poisoned), whole(values))


def test_a_bad_row_poisons_the_request_and_not_its_neighbour() -> None:
    values, what = logits(), scorer()
    sick, well = opened(what), opened(what)
    packed = torch.cat((values, values))
    packed[4] = torch.nan
    rows = np.arange(LENGTH)
    what.step(packed, [RequestRows(well, rows + LENGTH, rows), RequestRows(sick, rows, rows)])
    spans = np.array([options.get("span", "all") for options in KINDS])
    assert what.peak([sick])[0].isnan().tolist() == [span in ("all", "prompt") for span in spans]
    torch.testing.assert_close(what.peak([well])[0], whole(values), rtol=1e-5, atol=1e-5)


def test_a_prompt_of_skipped_tokens_only_is_scored_from_its_answer_on() -> None:
    what = scorer()
    request = what.open("r", prompt_length=2, skip=2, tail=3)
    give(what, request, logits(), range(2))
    assert (what.peak([request]) == -torch.inf).all()
    give(what, request, logits(), range(2, 5))
    assert what.peak([request])[0, 0].isfinite()


def test_closing_gives_the_slot_back_clean() -> None:
    what = scorer()
    first = opened(what)
    give(what, first, logits(), range(LENGTH))
    what.close(first)
    second = opened(what)
    assert second.slot == first.slot
    assert (what.peak([second]) == -torch.inf).all()
    with pytest.raises(ValueError, match="not in use"):
        what.close(Request("x", slot=5, prompt_length=1, skip=0, tail=0))

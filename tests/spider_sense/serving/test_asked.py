"""What a request shows of the logits, whichever way vLLM lets it ask for them."""

from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.extraction import Event
from spider_sense.serving.asked import asked_of


def asked(**params: Any) -> Any:
    unset = {"max_tokens": 1, "logit_bias": None, "logprobs": None, "logprob_token_ids": None}
    new = SimpleNamespace(req_id="chat-1", prompt_token_ids=[1, 2], sampling_params=SimpleNamespace(**unset | params))
    return asked_of(new, 1000)


@pytest.mark.parametrize(
    ("params", "biased", "shown"),
    [
        ({}, (), 0),
        ({"logit_bias": {7: 100.0, 3: -100.0}, "logprobs": 5}, (3, 7), 5),
        ({"logprob_token_ids": [9, 3, 9]}, (3, 9), 3),
        ({"logit_bias": {7: 1.0}, "logprobs": 1, "logprob_token_ids": [9, 3]}, (3, 7, 9), 2),
    ],
)
def test_logits_that_are_asked_for_by_a_bias_or_by_name(
    params: dict[str, Any], biased: tuple[int, ...], shown: int
) -> None:
    found = asked(**params)
    assert (found.biased, found.top_logprobs) == (biased, shown)


def test_all_logits_are_more_than_any_number() -> None:
    found = asked(logit_bias={7: 1.0, 8: 1.0}, logprobs=-1)
    assert found.top_logprobs >= 10**6
    Event(principal="ann", time=1.0, biased=found.biased, top_logprobs=found.top_logprobs)

"""What a request shows of the logits, whichever way vLLM lets it ask for them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spider_sense.extraction import Event
from spider_sense.extraction.rules import MANY_LONG
from spider_sense.serving.asked import asked_of
from spider_sense.serving.origin import CANARY, numbered

UNSET = dict.fromkeys(
    (
        "logit_bias",
        "logprobs",
        "logprob_token_ids",
        "allowed_token_ids",
        "prompt_logprobs",
        "prompt_logprob_token_ids",
        "extra_args",
    )
)


def asked(name: str = "chat-1", **params: Any) -> Any:
    sampling = SimpleNamespace(**UNSET | {"max_tokens": 1} | params)
    new = SimpleNamespace(req_id=name, prompt_token_ids=[1, 2], sampling_params=sampling)
    return asked_of(new, 1000)


@pytest.mark.parametrize(
    ("params", "biased", "shown"),
    [
        ({}, (), 0),
        ({"logit_bias": {7: 100.0, 3: -100.0}, "logprobs": 5}, (3, 7), 5),
        ({"logprob_token_ids": [9, 3, 9]}, (3, 9), 3),
        ({"logit_bias": {7: 1.0}, "logprobs": 1, "logprob_token_ids": [9, 3]}, (3, 7, 9), 2),
        ({"logit_bias": {7: 100.0}, "logprobs": 0}, (7,), 1),
        ({"logit_bias": {7: 100.0}}, (7,), 0),
        ({"logit_bias": {7: 1.0}, "prompt_logprobs": 4}, (7,), 4),
        ({"allowed_token_ids": [7, 3], "logprobs": 5}, (3, 7), 5),
        ({"allowed_token_ids": [7], "logprobs": 0}, (7,), 1),
        ({"allowed_token_ids": [7], "logprob_token_ids": [3]}, (3, 7), 1),
        # It narrows the answer and is told no logits.
        ({"allowed_token_ids": [7, 3]}, (), 0),
        ({"allowed_token_ids": [7, 3], "prompt_logprobs": 4}, (), 4),
    ],
)
def test_logits_that_are_asked_for_by_a_bias_by_name_or_by_allowing_no_others(
    params: dict[str, Any], biased: tuple[int, ...], shown: int
) -> None:
    found = asked(**params)
    assert (found.biased, found.top_logprobs) == (biased, shown)


def test_a_whole_vocabulary_is_told_as_more_than_a_rule_asks_for() -> None:
    found = asked(allowed_token_ids=list(range(150_000)), logprobs=1)
    assert MANY_LONG < len(found.biased) < 10_000


def test_all_logits_are_more_than_any_number() -> None:
    found = asked(logit_bias={7: 1.0, 8: 1.0}, prompt_logprobs=-1)
    assert found == asked(logit_bias={7: 1.0, 8: 1.0}, logprobs=-1)
    assert found.top_logprobs >= 10**6
    Event(principal="ann", time=1.0, biased=found.biased, top_logprobs=found.top_logprobs)


@pytest.mark.parametrize("rows", [[[7, 3, -1], [9, 7, 4], [3, -1, -1]], [[7, 3], [9, 7, 4], [3]]])
def test_each_token_of_the_prompt_at_which_logits_are_named_shows_them(rows: list[list[int]]) -> None:
    ids: Any = np.array(rows) if -1 in rows[0] else rows
    found = asked(prompt_logprob_token_ids=ids)
    assert (found.biased, found.top_logprobs, found.choices) == ((3, 4, 7, 9), 3, 1 + 3)
    Event(principal="ann", time=1.0, biased=found.biased, top_logprobs=found.top_logprobs, choices=found.choices)


@pytest.mark.parametrize("n", [5, 10**12])
def test_of_several_choices_the_first_says_how_many_there_are(n: int) -> None:
    """vLLM tells each choice that it is one of one."""
    shared = SimpleNamespace(extra_args={"own": 2})
    told = [numbered(lambda index: ("chat", shared), SimpleNamespace(n=n), index)[1] for index in range(3)]
    found = [asked(extra_args=params.extra_args) for params in told]
    assert [one and one.choices for one in found] == [min(n, 2**16), None, None]


@pytest.mark.parametrize(
    "name", ["1_x_0-12345678", "12_x-12345678", "spider_sense canary 0", "spider_sense canary_0-12"]
)
def test_a_request_is_a_question_whatever_it_is_called(name: str) -> None:
    assert asked(name).choices == 1
    assert asked(name, extra_args=CANARY) is None

"""What a request shows of the logits, whichever way vLLM lets it ask for them."""

from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.extraction import Event
from spider_sense.serving.asked import asked_of, numbered


def asked(**params: Any) -> Any:
    unset = {"max_tokens": 1, "logit_bias": None, "logprobs": None, "logprob_token_ids": None, "extra_args": None}
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


def test_the_first_of_several_choices_says_how_many_there_are() -> None:
    """vLLM tells each choice that it is one of one."""
    shared = {"spider_sense_choices": 1, "own": 2}
    params = SimpleNamespace(extra_args=shared, max_tokens=1, logit_bias={7: 1.0}, logprobs=1, logprob_token_ids=None)
    parent = SimpleNamespace(n=5)
    for index in range(2):
        name, told = numbered(lambda index: (f"{index}_chat", params), parent, index)
        new = SimpleNamespace(req_id=name, prompt_token_ids=[1], sampling_params=told)
        found = asked_of(new, 1000)
        assert (found and found.choices) == (None if index else 5)
    assert params.extra_args == {"spider_sense_choices": 5, "own": 2}
    assert shared["spider_sense_choices"] == 1, "what others share is left as it is"


@pytest.mark.parametrize(
    ("told", "choices"), [(None, 1), ({}, 1), ({"own": 3}, 1), (3, 3), (-4, 1), ("9", 1), (1e9, 1)]
)
def test_what_a_client_writes_there_makes_it_count_for_no_less(told: Any, choices: int) -> None:
    extra = told if told is None or isinstance(told, dict) else {"spider_sense_choices": told}
    found = asked(extra_args=extra)
    assert found.choices == choices


def test_more_choices_than_can_be_are_cut() -> None:
    assert asked(extra_args={"spider_sense_choices": 10**12}).choices == 2**16

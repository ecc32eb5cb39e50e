"""Each choice's verdict stands under its index, the worst above them, and a choice without one is never clear."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.serving.choices import collected, gathered, verdict_of, verdicts_of

CLEAR = {"zone": "clear", "action": "observe", "reason": "nothing"}
SUSPECT = {"zone": "suspect", "action": "flag", "reason": "misuse suspect"}
BREACH = {"zone": "breach", "action": "stop", "reason": "misuse breach"}
UNSEEN = {"zone": "clear", "action": "stop", "reason": "tokens are missing"}


@pytest.mark.parametrize(
    ("choices", "zone", "action"),
    [
        ([CLEAR, SUSPECT, BREACH], "breach", "stop"),
        ([CLEAR, SUSPECT], "suspect", "flag"),
        ([UNSEEN, SUSPECT], "clear", "stop"),
        ([UNSEEN, BREACH, UNSEEN], "breach", "stop"),
        ([CLEAR, None], None, None),
        ([BREACH, None], None, None),
    ],
)
def test_the_worst_choice_speaks_for_all(choices: list[Any], zone: str | None, action: str | None) -> None:
    said = verdict_of(choices)
    assert (said["zone"], said["action"]) == (zone, action)
    assert said["choices"] == choices


class Parent:
    """As much of vLLM's parent of ``n`` requests as is touched; it hands out whole answers or parts."""

    def __init__(self, n: int, streams: bool) -> None:
        self.n, self.streams, self.running = n, streams, n

    def child(self, index: int) -> Callable[..., Any]:
        state = SimpleNamespace(parent_req=self, request_index=index, logprobs_processor=None)

        def original(tokens: Any, pooled: Any, finish: Any, stop: Any, kv: Any = None, ec: Any = None) -> Any:
            self.running -= finish is not None
            if self.running and not self.streams:
                return None
            return SimpleNamespace(kv_transfer_params=kv, outputs=[None])

        return lambda finish, kv: collected(original, state, [7], None, finish, None, kv, None)


def test_an_abort_gives_everything_by_name_and_says_nothing() -> None:
    named: dict[str, Any] = {"new_token_ids": [], "pooling_output": None, "finish_reason": "abort", "stop_reason": None}

    def original(*args: Any, **options: Any) -> Any:
        assert (args, options) == ((), named)
        return SimpleNamespace(kv_transfer_params=None, outputs=[None])

    for parent in (None, SimpleNamespace(n=2)):
        result = collected(original, SimpleNamespace(parent_req=parent, request_index=0), **named)
        assert result.kv_transfer_params is None


def said(verdict: dict[str, Any]) -> dict[str, Any]:
    return {"spider_sense": verdict, "own": 1}


def test_a_whole_answer_holds_all_choices_in_whatever_order_they_end() -> None:
    parent = Parent(3, streams=False)
    first, second, third = (parent.child(index) for index in range(3))
    assert second("stop", said(BREACH)) is None
    assert first(None, None) is None
    assert third("length", said(SUSPECT)) is None
    whole = first("length", said(CLEAR)).kv_transfer_params
    assert whole["own"] == 1
    assert whole["spider_sense"] == {**BREACH, "choices": [CLEAR, BREACH, SUSPECT]}


def test_what_was_said_of_one_is_not_lost_behind_the_others() -> None:
    parent = Parent(2, streams=True)
    first, second = parent.child(0), parent.child(1)
    assert first(None, None).kv_transfer_params is None
    assert verdicts_of(first("stop", said(BREACH))) == [BREACH, None]
    # vLLM merges results that a slow reader has not taken, and keeps the parameters of the last.
    assert verdicts_of(second(None, None)) == [BREACH, None]
    assert verdicts_of(second("stop", None)) == [BREACH, None], "it ended without a verdict"


def test_a_single_choice_passes_as_it_is() -> None:
    state = SimpleNamespace(parent_req=None, request_index=0)
    params = said(CLEAR)
    result = collected(
        lambda *args: SimpleNamespace(kv_transfer_params=args[4]), state, [7], None, "stop", None, params
    )
    assert result.kv_transfer_params is params
    assert verdicts_of(result) == [CLEAR]


@pytest.mark.parametrize(
    ("verdict", "told", "want"),
    [
        (BREACH, [None], [None] * 4),
        (BREACH, [None, {5: 0.5}, {6: 0.5}, {7: 0.5}], [None, {5: 0.5}, {6: 0.5}, {7: 0.5}]),
        (BREACH, [], []),
        (BREACH, None, None),
        (SUSPECT, [None], [None]),
    ],
    ids=["not yet told", "known before", "handed out", "not asked for", "not stopped"],
)
def test_each_token_of_a_stopped_prompt_has_its_place_among_what_is_told(verdict: Any, told: Any, want: Any) -> None:
    processor = SimpleNamespace(prompt_logprobs=told)
    state = SimpleNamespace(
        parent_req=None, request_index=0, logprobs_processor=processor, prompt_token_ids=[4, 5, 6, 7]
    )

    def original(*args: Any) -> Any:
        return SimpleNamespace(kv_transfer_params=args[4], prompt_logprobs=list(told) if told is not None else None)

    assert collected(original, state, [7], None, "stop", None, said(verdict)).prompt_logprobs == want


def gather(*results: Any) -> Any:
    return gathered(lambda given, _: SimpleNamespace(kv_transfer_params=given[0].kv_transfer_params), None, results, "")


def result(verdict: dict[str, Any] | None, outputs: int = 1) -> Any:
    return SimpleNamespace(kv_transfer_params=None if verdict is None else said(verdict), outputs=[None] * outputs)


def test_several_prompts_are_gathered_in_the_order_of_their_choices() -> None:
    pair = verdict_of([CLEAR, SUSPECT])
    found = gather(result(pair, 2), result(verdict_of([BREACH, CLEAR]), 2)).kv_transfer_params
    assert found["own"] == 1
    assert found["spider_sense"] == {**BREACH, "choices": [CLEAR, SUSPECT, BREACH, CLEAR]}
    found = gather(result(None, 2), result(pair, 2)).kv_transfer_params["spider_sense"]
    assert (found["zone"], found["choices"]) == (None, [None, None, CLEAR, SUSPECT])


def test_one_prompt_and_an_engine_without_a_guard_are_left_alone() -> None:
    assert gather(result(CLEAR)).kv_transfer_params == said(CLEAR)
    assert gather(result(None), result(None)).kv_transfer_params is None

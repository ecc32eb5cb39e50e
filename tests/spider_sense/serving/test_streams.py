"""The chunk that ends an answer carries the verdict, every other line passes as it was."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from spider_sense.serving.choices import verdict_of
from spider_sense.serving.streams import streamed_chat, streamed_completion, with_verdict

CLEAR = {"zone": "clear", "action": "observe", "reason": "nothing"}
BREACH = {"zone": "breach", "action": "stop", "reason": "misuse breach"}


def lines_of(results: list[Any], lines: list[list[str]], n: int | None = None, prompts: bool = False) -> list[str]:
    """Stream results, each of which makes some lines; those of several prompts come with the prompt's index."""

    async def engine() -> AsyncIterator[Any]:
        for result in results:
            yield result

    async def original(request: Any, *given: Any, name: str) -> AsyncIterator[str]:
        inputs, taken, rest = given if prompts else (["prompts"], *given)
        assert (request.n, inputs, rest, name) == (n, ["prompts"], "id", "smollm2")
        place = 0
        async for _ in taken:
            for line in lines[place]:
                yield line
            place += 1
        yield "data: [DONE]\n\n"

    async def run() -> list[str]:
        request = SimpleNamespace(n=n)
        if prompts:
            stream = streamed_completion(original, None, request, ["prompts"], engine(), "id", name="smollm2")
        else:
            stream = streamed_chat(original, None, request, engine(), "id", name="smollm2")
        return [line async for line in stream]

    return asyncio.run(run())


def result(said: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(kv_transfer_params=None if said is None else {"spider_sense": said, "own": 1})


def chunk(text: str, finish: str | None, index: int = 0) -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def verdict_in(line: str) -> Any:
    return json.loads(line.removeprefix("data: "))["kv_transfer_params"]["spider_sense"]


def test_the_last_chunk_carries_the_verdict() -> None:
    plain = [chunk("finish_reason", None), ": comment\n\n"]
    usage = 'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
    found = lines_of([result(), result(CLEAR)], [plain, [chunk("ü", "stop"), usage]])
    assert found[:2] == plain
    assert found[2].endswith("\n\n")
    last = json.loads(found[2].removeprefix("data: "))
    assert last["kv_transfer_params"] == {"spider_sense": CLEAR}
    assert last["choices"][0]["delta"]["content"] == "ü"
    assert found[3:] == [usage, "data: [DONE]\n\n"]


def test_without_a_verdict_nothing_is_touched() -> None:
    lines = [chunk("a", None), chunk("b", "stop")]
    assert lines_of([result(), result()], [lines[:1], lines[1:]]) == [*lines, "data: [DONE]\n\n"]


def test_each_choice_gets_its_own() -> None:
    first, both = result(verdict_of([None, BREACH, None])), result(verdict_of([CLEAR, BREACH, None]))
    # The last two end in one result, and one of them without a verdict.
    lines = [[chunk("a", "length", 1)], [chunk("b", "stop", 0), chunk("c", "stop", 2)]]
    found = lines_of([first, both], lines, n=3)
    assert [verdict_in(line) for line in found[:3]] == [BREACH, CLEAR, None]


def test_each_choice_of_each_prompt_gets_its_own() -> None:
    results = [(1, result(verdict_of([CLEAR, BREACH]))), (0, result(verdict_of([BREACH, CLEAR])))]
    lines = [[chunk("a", "stop", 2), chunk("b", "stop", 3)], [chunk("c", "stop", 0), chunk("d", "stop", 1)]]
    found = lines_of(results, lines, n=2, prompts=True)
    assert [verdict_in(line) for line in found[:4]] == [CLEAR, BREACH, BREACH, CLEAR]
    single = lines_of([(1, result(BREACH)), (0, result(CLEAR))], [lines[1][1:], lines[1][:1]], prompts=True)
    assert [verdict_in(line) for line in single[:2]] == [BREACH, CLEAR]


def test_an_answer_says_its_verdict_and_that_it_was_stopped() -> None:
    answer = {"id": "a", "choices": [{"index": 0, "finish_reason": "length"}]}
    clear, stopped = (with_verdict(answer, said) for said in (CLEAR, BREACH))
    assert clear == {**answer, "kv_transfer_params": {"spider_sense": CLEAR}}
    why = {"finish_reason": "stop", "stop_reason": "spider_sense: misuse breach"}
    assert stopped["choices"] == [{"index": 0, **why}]
    last = with_verdict({"type": "response.completed", "response": {"id": "b"}}, BREACH)
    assert last["response"] == {"id": "b", "kv_transfer_params": {"spider_sense": BREACH}}

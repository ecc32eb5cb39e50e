"""The chunk that ends an answer carries the verdict, every other line passes as it was."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from spider_sense.serving.streams import streamed


def lines_of(results: list[Any], lines: list[list[str]]) -> list[str]:
    """Stream results, each of which makes some lines."""

    async def engine() -> AsyncIterator[Any]:
        for result in results:
            yield result

    async def original(request: str, given: AsyncIterator[Any], *rest: str, name: str) -> AsyncIterator[str]:
        assert (request, rest, name) == ("request", ("id",), "smollm2")
        place = 0
        async for _ in given:
            for line in lines[place]:
                yield line
            place += 1
        yield "data: [DONE]\n\n"

    async def run() -> list[str]:
        return [line async for line in streamed(original, None, "request", engine(), "id", name="smollm2")]

    return asyncio.run(run())


def result(said: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(kv_transfer_params=None if said is None else {"spider_sense": said, "own": 1})


def chunk(text: str, finish: str | None) -> str:
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}, 'finish_reason': finish}]})}\n\n"


def test_the_last_chunk_carries_the_verdict() -> None:
    plain = [chunk("finish_reason", None), ": comment\n\n"]
    usage = 'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
    found = lines_of([result(), result({"zone": "clear"})], [plain, [chunk("ü", "stop"), usage]])
    assert found[:2] == plain
    assert found[2].endswith("\n\n")
    last = json.loads(found[2].removeprefix("data: "))
    assert last["kv_transfer_params"] == {"spider_sense": {"zone": "clear"}}
    assert last["choices"][0]["delta"]["content"] == "ü"
    assert found[3:] == [usage, "data: [DONE]\n\n"]


def test_without_a_verdict_nothing_is_touched() -> None:
    lines = [chunk("a", None), chunk("b", "stop")]
    assert lines_of([result(), result()], [lines[:1], lines[1:]]) == [*lines, "data: [DONE]\n\n"]


def test_each_choice_gets_its_own() -> None:
    first, second = result({"zone": "clear"}), result({"zone": "breach"})
    found = lines_of([first, second], [[chunk("a", "length")], [chunk("b", "stop")]])
    zones = [
        json.loads(line.removeprefix("data: "))["kv_transfer_params"]["spider_sense"]["zone"] for line in found[:2]
    ]
    assert zones == ["clear", "breach"]

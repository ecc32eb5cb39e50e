"""The verdict in an answer, and in a stream of one: the chunk that ends a choice carries what is said of it."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from spider_sense.serving.choices import Said, verdicts_of
from spider_sense.serving.settings import FIELD, KEY

__all__ = ["event_of", "line_of", "streamed_chat", "streamed_completion", "with_verdict"]

_DATA, _END = "data: ", "\n\n"
Lines = Callable[..., AsyncIterator[str]]


def event_of(line: str) -> dict[str, Any]:
    """Return what a server-sent event holds."""
    event: dict[str, Any] = json.loads(line.removeprefix(_DATA))
    return event


def line_of(event: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"{_DATA}{json.dumps(event, separators=(',', ':'), ensure_ascii=False)}{_END}"


def with_verdict(answer: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Return an answer in the form of OpenAI's, or the event that ends a stream of one, with its verdict.

    Args:
        answer: JSON-ready.
        said: the verdict.
    """
    if "response" in answer:  # the last event of a stream of /v1/responses holds the whole answer
        return {**answer, "response": with_verdict(answer["response"], said)}
    answer = {**answer, FIELD: {KEY: said}}
    if said["action"] == "stop" and "choices" in answer:
        stopped = {"finish_reason": "stop", "stop_reason": f"{KEY}: {said['reason']}"}
        answer["choices"] = [{**choice, **stopped} for choice in answer["choices"]]
    return answer


async def streamed_chat(
    original: Lines, serving: Any, request: Any, results: AsyncIterator[Any], *args: Any, **options: Any
) -> AsyncIterator[str]:
    """Pass on the lines of a stream, with the verdict put into those that end a choice.

    Args:
        original: makes the lines of server-sent events out of results.
        serving: what ``original`` belongs to.
        request: the client's.
        results: the engine's, the last one of each choice with its verdict.
        args: passed on.
        options: passed on.
    """
    verdicts = _Verdicts(request.n)

    async def watched() -> AsyncIterator[Any]:
        async for result in results:
            verdicts.take(0, result)
            yield result

    async for line in original(request, watched(), *args, **options):
        yield verdicts.put(line)


async def streamed_completion(
    original: Lines, serving: Any, request: Any, inputs: Any, results: AsyncIterator[Any], *args: Any, **options: Any
) -> AsyncIterator[str]:
    """Do the same for a request that may hold several prompts.

    Args:
        original: makes the lines of server-sent events out of results.
        serving: what ``original`` belongs to.
        request: the client's.
        inputs: passed on.
        results: the engine's, each with the index of its prompt.
        args: passed on.
        options: passed on.
    """
    verdicts = _Verdicts(request.n)

    async def watched() -> AsyncIterator[Any]:
        async for prompt, result in results:
            verdicts.take(prompt, result)
            yield prompt, result

    async for line in original(request, inputs, watched(), *args, **options):
        yield verdicts.put(line)


class _Verdicts:
    """What is said of each choice of a stream, by the index that the client sees."""

    def __init__(self, choices: int | None) -> None:
        self._choices = choices or 1
        """Of each prompt."""
        self._said: dict[int, Said | None] = {}

    def take(self, prompt: int, result: Any) -> None:
        for place, said in enumerate(verdicts_of(result)):
            self._said[prompt * self._choices + place] = said

    def put(self, line: str) -> str:
        """Return a line with the verdict of the choice that it ends, null if others have one and it has none."""
        if not self._said or not line.startswith(_DATA + "{"):
            return line
        chunk = event_of(line)
        # vLLM puts one choice into a chunk.
        ended = [choice["index"] for choice in chunk.get("choices", ()) if choice.get("finish_reason")]
        if not ended:
            return line
        chunk[FIELD] = {**(chunk.get(FIELD) or {}), KEY: self._said.get(ended[0])}
        return line_of(chunk)

"""The verdict in a stream: the chunk that ends an answer carries what a whole answer would."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from spider_sense.serving.settings import KEY

__all__ = ["streamed"]

_DATA, _END = "data: ", "\n\n"
_FIELD = "kv_transfer_params"


async def streamed(
    original: Callable[..., AsyncIterator[str]],
    serving: Any,
    request: Any,
    results: AsyncIterator[Any],
    *args: Any,
    **options: Any,
) -> AsyncIterator[str]:
    """Pass on the lines of a stream, with the verdict put into those that end an answer.

    Args:
        original: makes the lines of server-sent events out of results.
        serving: what ``original`` belongs to.
        request: the client's.
        results: the engine's, the last one of each answer with the verdict.
        args: passed on.
        options: passed on.
    """
    latest: dict[str, Any] = {}

    async def watched() -> AsyncIterator[Any]:
        async for result in results:
            said = (result.kv_transfer_params or {}).get(KEY)
            if said is not None:
                latest[KEY] = said
            yield result

    async for line in original(request, watched(), *args, **options):
        yield _with(line, latest) if latest else line


def _with(line: str, said: dict[str, Any]) -> str:
    if not line.startswith(_DATA) or not line.removeprefix(_DATA).startswith("{"):
        return line
    chunk = json.loads(line.removeprefix(_DATA))
    if not any(choice.get("finish_reason") for choice in chunk.get("choices", ())):
        return line
    chunk[_FIELD] = {**(chunk.get(_FIELD) or {}), **said}
    return f"{_DATA}{json.dumps(chunk, separators=(',', ':'), ensure_ascii=False)}{_END}"

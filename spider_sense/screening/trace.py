"""Recorded conversations: a JSON line each, ``{"id", "messages", "tools", "principal"}``, all but messages optional."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spider_sense.errors import DataError
from spider_sense.screening.message import Message

__all__ = ["Trace", "read_traces"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One conversation."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    """What the model was offered; None if the record does not say."""
    principal: str | None = None
    """Whose agent it is."""


def read_traces(path: Path) -> Iterator[Trace]:
    """Read a file of traces, one at a time; empty lines and other fields are passed over.

    Raises:
        DataError: if the file cannot be read, naming the line if it is a line's fault.
    """
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _trace(line, f"{path.stem}-{number}", f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a file of JSON lines") from error


def _trace(line: bytes, name: str, where: str) -> Trace:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if isinstance(record, list):
        record = {"messages": record}
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: has no messages; write {{"messages": [{{"role": "user", "content": "..."}}]}}')
    tools, principal = record.get("tools"), record.get("principal")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: tools is not a list of JSON schemas")
    if principal is not None and not isinstance(principal, str):
        raise DataError(f"{where}: principal is {principal!r:.60}, not a name")
    return Trace(
        id=str(record.get("id", name)),
        messages=tuple(Message.parse(item, f"{where}, message {place}") for place, item in enumerate(messages)),
        tools=None if tools is None else tuple(tools),
        principal=principal,
    )

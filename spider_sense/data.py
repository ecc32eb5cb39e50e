"""Prompt sets: their rows, and reading them.

A prompt set is a file of JSON lines ``{"id", "text", "label", "category"}``. A row may hold ``messages``, a list of
``{"role", "content"}``, in place of ``text`` or beside it, a ``response``, and a ``pair``: rows of one file with the
same pair are never separated by a split.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from spider_sense.errors import DataError

__all__ = ["Example", "digest", "read_jsonl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of a prompt set."""

    id: str
    text: str
    """The prompt; of a conversation without a ``text``, its contents with an empty line between them."""
    label: str
    """As the file says it; empty if the row has none."""
    category: str
    source: str
    """Stem of the file's name."""
    group: str
    """What must stay on one side of a split: the pair, or the row alone."""
    response: str | None = None
    turns: tuple[tuple[str, str], ...] | None = None
    """The conversation as (role, content), if the row has one."""


def read_jsonl(path: str | Path, require_label: bool = True) -> list[Example]:
    """Read a prompt set; fields that are not known and empty lines are passed over.

    A row without an ``id`` gets ``<stem>-<line>``.

    Raises:
        DataError: with the file and the line, if a row cannot be used or repeats an id.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a file of JSON lines") from error
    examples: list[Example] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = _example(line, path.stem, number, require_label)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if example.id in first_line:
            raise DataError(
                f"{path}, line {number}: the id {example.id!r} is already on line {first_line[example.id]}; "
                "give each row its own, or none"
            )
        first_line[example.id] = number
        examples.append(example)
    return examples


def _example(line: bytes, stem: str, number: int, require_label: bool) -> Example:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f'holds {row!r:.60}, not an object; write {{"text": ..., "label": ...}}')
    turns = _turns(row["messages"]) if "messages" in row else None
    text = row.get("text")
    if text is None and turns:
        text = "\n\n".join(content for _, content in turns)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text is {text!r}; a row needs a 'text' that is not empty, or 'messages'")
    label = row.get("label", None if require_label else "")
    if not isinstance(label, str):
        raise ValueError(f"the label is {label!r}; it must be a string such as 'harmful' or 'benign'")
    name = f"{stem}-{number}" if row.get("id") is None else str(row["id"])
    response = row.get("response")
    return Example(
        id=name,
        text=text,
        label=label,
        category=str(row.get("category", "")),
        source=stem,
        group=f"{stem}:{row.get('pair', name)}",
        response=None if response is None else str(response),
        turns=turns,
    )


def _turns(messages: object) -> tuple[tuple[str, str], ...]:
    turns: list[tuple[str, str]] = []
    for message in messages if isinstance(messages, list) and messages else [None]:
        match message:
            case {"role": str(role), "content": str(content)}:
                turns.append((role, content))
            case _:
                raise ValueError(f'a message is {message!r:.60}; write {{"role": "user", "content": "..."}}')
    return tuple(turns)


def digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of every field of all examples in hexadecimal; their order does not matter."""
    rows = sorted(json.dumps(asdict(example), sort_keys=True) for example in examples)
    return hashlib.sha256("\n".join(rows).encode("ascii")).hexdigest()

"""The prompt set that comes with the package: original contrast pairs, everyday requests, special requests.

``data/pairs/<category>.jsonl`` holds 50 pairs a category: a request that is misuse, and one on the same topic in nearly
the same words that is not. ``data/everyday.jsonl`` is innocent traffic; ``data/special.jsonl`` holds prompt injections,
jailbreaks, extraction requests and innocent look-alikes of each. ``data/evasion.jsonl`` is held out: pairs in four
languages that nothing is trained on. ``data/tool_outputs.jsonl`` holds what tools gave to an agent, each once with an
instruction to the agent in it, and once with a harmless one to somebody else in its place.
"""

import json
from dataclasses import replace
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from typing import Any, Literal

from spider_sense.data import Example, read_jsonl

__all__ = ["Language", "load_corpus", "load_evasion", "load_tool_outputs"]

Language = Literal["en", "de", "es", "fr"]
"""English and the languages that the held-out pairs are translated into."""

SIDES = ("harmful", "benign")


def load_corpus() -> list[Example]:
    """Read the whole set, pairs first, in an order that is the same on every machine.

    Returns:
        Examples of the sources ``corpus_pairs``, ``corpus_everyday`` and ``corpus_special``. The two sides of a pair
        share their ``group``.
    """
    data = files(__name__) / "data"
    categories = sorted((data / "pairs").iterdir(), key=lambda file: file.name)
    pairs = [example for file in categories if file.name.endswith(".jsonl") for example in _read_pairs(file)]
    return [*pairs, *_read(data / "everyday.jsonl", "everyday"), *_read(data / "special.jsonl", "special")]


def load_evasion(language: Language = "en") -> list[Example]:
    """Read the held-out pairs, which are no part of :func:`load_corpus`.

    Args:
        language: rows without a translation into it are left out.

    Returns:
        Examples of the source ``corpus_evasion``. A row has the same id in every language; the two sides of a pair
        share their ``group``.
    """
    lines = (files(__name__) / "data" / "evasion.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        _side(row, side, row[side][language], "corpus_evasion")
        for row in map(json.loads, lines)
        for side in SIDES
        if language in row[side]
    ]


def load_tool_outputs() -> list[Example]:
    """Read the outputs of tools, which are no part of :func:`load_corpus`.

    Returns:
        Examples of the source ``corpus_tool_outputs``, labelled ``injection`` and ``benign``; the two sides of a pair
        share their ``group``. ``turns`` are a user's task, the call as text, and the output, which is ``text``.
    """
    lines = (files(__name__) / "data" / "tool_outputs.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        replace(_side(row, side, row[side], "corpus_tool_outputs"), turns=_turns(row, side))
        for row in map(json.loads, lines)
        for side in ("injection", "benign")
    ]


def _turns(row: dict[str, Any], side: str) -> tuple[tuple[str, str], ...]:
    call = json.dumps([{"name": row["tool"], "arguments": {}}])
    return ("user", row["task"]), ("assistant", f"<tool_call>{call}</tool_call>"), ("tool", row[side])


def _read(file: Traversable, name: str) -> list[Example]:
    with as_file(file) as path:
        examples = read_jsonl(path)
    return [replace(example, source=f"corpus_{name}", group=example.id) for example in examples]


def _read_pairs(file: Traversable) -> list[Example]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [_side(row, side, row[side], "corpus_pairs") for row in rows for side in SIDES]


def _side(row: dict[str, Any], side: str, text: str, source: str) -> Example:
    return Example(
        id=f"{row['id']}-{side}", text=text, label=side, category=row["category"], source=source, group=row["id"]
    )

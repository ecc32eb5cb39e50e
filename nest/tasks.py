"""Utility tasks as files of JSON lines.

A row of a choice task is ``{"text", "choices", "gold"}``, of a last-word task ``{"text", "continuation"}``. A file
whose rows have neither holds documents for perplexity.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spider_sense.errors import DataError

__all__ = ["Task", "TaskRow", "read_tasks", "utility_files"]

Kind = Literal["choice", "last_word", "documents"]
_LONG_CHOICES = ("arc_challenge", "hellaswag", "piqa")
"""Tasks whose accuracy is usually quoted with log-likelihoods divided by the choices' lengths."""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One question, or one document."""

    id: str
    text: str
    choices: tuple[str, ...]
    """What may follow; the one continuation in a last-word task, empty for a document."""
    gold: int


@dataclass(frozen=True, slots=True)
class Task:
    """A file of questions of one kind."""

    name: str
    """Stem of the file's name."""
    kind: Kind
    rows: tuple[TaskRow, ...]

    @property
    def normalised(self) -> bool:
        """Whether the figure to quote divides log-likelihoods by the number of characters of the choice."""
        return any(name in self.name for name in _LONG_CHOICES)


def utility_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files that paths name; a folder stands for its ``util_*.jsonl``.

    Raises:
        DataError: if a folder holds none, or a file does not exist.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("util_*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path} holds no util_*.jsonl; name files of JSON lines")
        files += found
    return files


def read_tasks(paths: Sequence[str | Path]) -> list[Task]:
    """Read tasks; see :func:`utility_files` for what paths may be.

    Raises:
        DataError: with the file and the line, if a row cannot be used, its kind differs from the row before, a file is
            empty, or two have one name.
    """
    tasks: dict[str, Task] = {}
    for file in utility_files(paths):
        if file.stem in tasks:
            raise DataError(f"two utility files are called {file.stem!r}; rename one, results are listed by that name")
        tasks[file.stem] = _read(file)
    return list(tasks.values())


def _read(file: Path) -> Task:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; name a file of JSON lines") from error
    kinds: set[Kind] = set()
    rows: list[TaskRow] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                kind, row = _row(json.loads(line), f"{file.stem}-{number}")
            except ValueError as error:
                raise DataError(f"{file}, line {number}: {error}") from error
            kinds.add(kind)
            rows.append(row)
    if len(kinds) != 1:
        held = f"rows of kinds {', '.join(sorted(kinds))}" if kinds else "no rows"
        raise DataError(f"{file} holds {held}; a utility file holds rows of one kind")
    return Task(file.stem, kinds.pop(), tuple(rows))


def _row(row: Any, default_id: str) -> tuple[Kind, TaskRow]:
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f"holds {row!r:.60}; a row needs a 'text' that is not empty")
    if "context_options" in row:
        raise ValueError("has 'context_options', several texts with one continuation, which is not supported")
    name = str(row.get("id", default_id))
    if "choices" in row:
        return "choice", TaskRow(name, row["text"], *_choices(row))
    if "continuation" in row:
        if not isinstance(row["continuation"], str) or not row["continuation"].strip():
            raise ValueError(f"the continuation is {row['continuation']!r}; it must be the word that follows")
        return "last_word", TaskRow(name, row["text"], (row["continuation"],), 0)
    return "documents", TaskRow(name, row["text"], (), 0)


def _choices(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    choices, gold = row["choices"], row.get("gold")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"the choices are {choices!r:.80}; they must be two or more texts that are not empty")
    if not isinstance(gold, int) or gold not in range(len(choices)):
        raise ValueError(f"gold is {gold!r}; it must be the place of the right choice, 0 to {len(choices) - 1}")
    return tuple(choices), gold

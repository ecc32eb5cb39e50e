"""Conversations to train and test the probes of the stages on.

Each has one stage in question, whose span carries the label; what stands before it is harmless. Prompt sets are given a
conversation here: an instruction that a file holds alone is what a user asks, or what a tool returns.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from spider_sense.corpus import load_corpus, load_tool_outputs
from spider_sense.errors import DataError
from spider_sense.screening.agent_examples import agent_examples
from spider_sense.screening.paired_examples import paired_examples
from spider_sense.screening.stage_example import Row, StageExample, built, observed

__all__ = ["SOURCES", "stage_examples"]

ASKED = "Open the newest message and tell me what it says."


def stage_examples(folder: Path | None) -> list[StageExample]:
    """Build all of them.

    Args:
        folder: of the prompt sets in ``SOURCES``; None for the package's own texts alone.

    Raises:
        DataError: if a prompt set is missing or a line of it cannot be read.
    """
    found = [*_own_outputs(), *_own_requests()]
    if folder is not None:
        for name, build in SOURCES.items():
            found += build(_read(folder / f"{name}.jsonl"), name)
    return found


def _own_outputs() -> Iterator[StageExample]:
    for row in load_tool_outputs():
        yield StageExample(row, "observation", row.category if row.label == "injection" else "")


def _own_requests() -> Iterator[StageExample]:
    for row in load_corpus():
        if row.source == "corpus_special" and row.label in ("injection", "benign"):
            yield built("query", "corpus_special", row.id, row.label, [("user", row.text)], row.category)


def _instructions(rows: Sequence[Row], source: str) -> Iterator[StageExample]:
    """Give each text twice: as what a user asks, and as what a tool returns."""
    for row in rows:
        if row["label"] in ("injection", "benign"):
            asked, group = [("user", row["text"])], f"{source}:{row['id']}"
            yield built("query", source, f"{row['id']}-query", row["label"], asked, row["category"], group)
            turns = observed(ASKED, "read_message", row["text"])
            yield built("observation", source, f"{row['id']}-observed", row["label"], turns, row["category"], group)


def _requests(rows: Sequence[Row], source: str) -> Iterator[StageExample]:
    for row in rows:
        yield built("query", source, row["id"], "benign", [("user", row["text"])], "")


def _read(path: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; name the folder that holds it") from error


SOURCES: Mapping[str, Callable[[Sequence[Row], str], Iterator[StageExample]]] = {
    "bipia_train": paired_examples,
    "asb": agent_examples,
    "deepset_prompt_injections": _instructions,
    "giskard_prompt_injections": _instructions,
    "system_prompt_extraction": _instructions,
    "tau2_agent_requests": _requests,
}
"""Prompt sets by file stem."""

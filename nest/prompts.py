"""Prompts of one side, from files and from the corpus that comes with the package."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spider_sense.corpus import load_corpus
from spider_sense.data import Example, read_jsonl
from spider_sense.errors import DataError
from spider_sense.labels import MISUSE

__all__ = ["CORPUS", "Prompts", "Side", "load_prompts"]

Side = Literal["harmful", "benign"]

CORPUS = "corpus"
"""Names the matched pairs of the package in the place of a file."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of one side."""

    examples: tuple[Example, ...]
    left_out: Counter[str]
    """Rows of the files that are on no side or the other one, by label."""


def load_prompts(names: Sequence[str], side: Side, limit: int | None = None, seed: int = 0) -> Prompts:
    """Read prompt sets and keep the rows that are on one side.

    A label decides: what :data:`spider_sense.labels.MISUSE` calls positive is harmful, what it calls negative benign,
    and any other row is left out. A row without a label is on the side that it is read for.

    Args:
        names: files of JSON lines, or ``corpus`` for the matched pairs of the package.
        side: the side.
        limit: most prompts to keep, drawn by hash; with the same limit and seed both sides of a file of pairs keep the
            same pairs.
        seed: another seed draws others.

    Raises:
        DataError: if a file cannot be used, or no row is left.
    """
    rows = [example for name in names for example in _rows(name, side)]
    kept = [example for example in rows if not example.label or MISUSE.label(example) is (side == "harmful")]
    left_out = Counter(example.label for example in rows) - Counter(example.label for example in kept)
    if not kept:
        raise DataError(
            f"no {side} prompt in {', '.join(names)}: the labels are {dict(left_out)}; "
            f"name a file that has some, or leave the label out of its rows"
        )
    if limit is not None and len(kept) > limit:
        drawn = set(sorted(range(len(kept)), key=lambda index: _draw(kept[index], seed))[:limit])
        kept = [example for index, example in enumerate(kept) if index in drawn]
    return Prompts(tuple(kept), left_out)


def _rows(name: str, side: Side) -> list[Example]:
    if name == CORPUS:
        return [example for example in load_corpus() if (example.source, example.label) == ("corpus_pairs", side)]
    return read_jsonl(name, require_label=False)


def _draw(example: Example, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{example.group}".encode("utf-8", "surrogatepass")).digest()

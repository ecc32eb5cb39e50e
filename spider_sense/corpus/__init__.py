"""The prompt set that comes with the package: original contrast pairs, everyday requests, special requests.

``data/pairs/<category>.jsonl`` holds 50 pairs a category: a request that is misuse, and one on the same topic in nearly
the same words that is not. ``data/everyday.jsonl`` is innocent traffic; ``data/special.jsonl`` holds prompt injections,
jailbreaks, extraction requests and innocent look-alikes of each.
"""

import json
from dataclasses import replace
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable

from spider_sense.data import Example, read_jsonl

__all__ = ["load_corpus"]


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


def _read(file: Traversable, name: str) -> list[Example]:
    with as_file(file) as path:
        examples = read_jsonl(path)
    return [replace(example, source=f"corpus_{name}", group=example.id) for example in examples]


def _read_pairs(file: Traversable) -> list[Example]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Example(
            id=f"{row['id']}-{side}",
            text=row[side],
            label=side,
            category=row["category"],
            source="corpus_pairs",
            group=row["id"],
        )
        for row in rows
        for side in ("harmful", "benign")
    ]

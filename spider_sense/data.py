"""Prompt sets: reading them, saying which rows are positive, and splitting them without a leak.

A prompt set is a file of JSON lines ``{"id", "text", "label", "category"}``. A row may hold ``messages``, a list of
``{"role", "content"}``, in place of ``text`` or beside it, a ``response``, and a ``pair``: rows of one file with the
same pair are never separated by a split.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import ConfigError, DataError, nearest

__all__ = [
    "EXTRACTION",
    "INJECTION",
    "MISUSE",
    "NEGATIVE",
    "Example",
    "LabelMap",
    "LabelledSet",
    "digest",
    "labelled",
    "read_jsonl",
    "split",
]

FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}
SIDES = ("positive", "negative", "ignore")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMap:
    """Which labels are positive for a detector and which are negative; all others are ignored."""

    positive: frozenset[str]
    negative: frozenset[str]

    def __post_init__(self) -> None:
        both = self.positive & self.negative
        if both:
            raise ConfigError(f"labels {sorted(both)} are positive and negative at once; choose one")

    def label(self, example: Example) -> bool | None:
        """Return True, False, or None for a row that is ignored."""
        if example.label in self.positive:
            return True
        return False if example.label in self.negative else None

    def with_overrides(self, overrides: Iterable[str]) -> "LabelMap":
        """Return a map changed by texts such as ``harmful_content=positive`` or ``utility=ignore``, in their order.

        Raises:
            ConfigError: if a text is anything else.
        """
        sides = dict.fromkeys(self.positive, "positive") | dict.fromkeys(self.negative, "negative")
        for text in overrides:
            label, equals, side = text.partition("=")
            if not label or not equals:
                raise ConfigError(f"cannot read {text!r}; write LABEL=positive, LABEL=negative or LABEL=ignore")
            if side not in SIDES:
                raise ConfigError(f"unknown side {side!r} in {text!r}; {nearest(side, SIDES)}")
            sides[label] = side
        return LabelMap(positive=_of_side(sides, "positive"), negative=_of_side(sides, "negative"))


def _of_side(sides: Mapping[str, str], side: str) -> frozenset[str]:
    return frozenset(label for label, its_side in sides.items() if its_side == side)


NEGATIVE = frozenset({"benign", "jailbreak_benign_payload", "utility"})
MISUSE = LabelMap(positive=frozenset({"harmful", "harmful_noisy", "jailbreak"}), negative=NEGATIVE)
INJECTION = LabelMap(positive=frozenset({"injection"}), negative=NEGATIVE)
EXTRACTION = LabelMap(positive=frozenset({"extraction"}), negative=NEGATIVE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledSet:
    """Examples with a class each; compared by identity."""

    examples: tuple[Example, ...]
    labels: NDArray[np.bool_]
    """True where the example is positive; as long as ``examples``."""
    ignored: int = 0
    """Rows that were left out because their label has no side."""
    ignored_labels: Counter[str] = field(default_factory=Counter)
    """How many of them by label."""

    def __len__(self) -> int:
        return len(self.examples)


def labelled(examples: Sequence[Example], label_map: LabelMap, *, need_both: bool = True) -> LabelledSet:
    """Give each example its class and leave out those that have none.

    Args:
        examples: rows of any number of files.
        label_map: which labels are positive and negative.
        need_both: whether a set without positives or without negatives is an error.

    Raises:
        DataError: if a class that is needed is empty.
    """
    classes = [label_map.label(example) for example in examples]
    rows = [(example, label) for example, label in zip(examples, classes, strict=True) if label is not None]
    if need_both:
        _require_both({label for _, label in rows}, examples, label_map)
    ignored = Counter(example.label for example, label in zip(examples, classes, strict=True) if label is None)
    return LabelledSet(
        examples=tuple(example for example, _ in rows),
        labels=np.array([label for _, label in rows], dtype=np.bool_),
        ignored=ignored.total(),
        ignored_labels=ignored,
    )


def _require_both(found: set[bool], examples: Sequence[Example], label_map: LabelMap) -> None:
    counts = dict(Counter(example.label for example in examples))
    for label, name, wanted in ((True, "positive", label_map.positive), (False, "negative", label_map.negative)):
        if label not in found:
            raise DataError(
                f"no {name} example: the labels are {counts}, {name} are {sorted(wanted)}; "
                f"add a file that has some, or map another label: --label LABEL={name}"
            )


def split(examples: LabelledSet, fractions: Mapping[str, float] = FRACTIONS, seed: int = 0) -> dict[str, LabelledSet]:
    """Split a set by group, so that no group (a pair) is separated.

    Groups are stratified by their sources and classes. Within a stratum they are ordered by the SHA-256 of seed and
    group name and cut in proportion, to within one group of each fraction. So a file that is added moves no row of
    another file.

    Args:
        examples: the set.
        fractions: share of each part; they sum to 1.
        seed: another seed gives another split.

    Returns:
        A set for each name in ``fractions``, in its order, with the rows in theirs.

    Raises:
        ConfigError: if a fraction is not positive or they do not sum to 1.
    """
    total = sum(fractions.values())
    if abs(total - 1) > 1e-9 or min(fractions.values(), default=0) <= 0:
        raise ConfigError(f"cannot split by {dict(fractions)}; each fraction must be above 0 and their sum must be 1")
    names, bounds = list(fractions), list(accumulate(fractions.values()))[:-1]
    part_of = {
        group: names[bisect_right(bounds, place)]
        for stratum, groups in _strata(examples).items()
        for group, place in _places(stratum, groups, seed)
    }
    return {name: _part(examples, [part_of[example.group] == name for example in examples.examples]) for name in names}


def _strata(examples: LabelledSet) -> dict[str, list[str]]:
    kinds: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for example, label in zip(examples.examples, examples.labels.tolist(), strict=True):
        kinds[example.group].add((example.source, label))
    strata: dict[str, list[str]] = defaultdict(list)
    for group, kind in kinds.items():
        strata[json.dumps(sorted(kind))].append(group)
    return strata


def _places(stratum: str, groups: Sequence[str], seed: int) -> list[tuple[str, float]]:
    # The offset is the stratum's own: without one, every stratum of a single group would land in the same part.
    offset = _uniform(stratum, seed)
    order = sorted(groups, key=lambda group: _uniform(group, seed))
    return [(group, (rank + offset) / len(order)) for rank, group in enumerate(order)]


def _uniform(name: str, seed: int) -> float:
    code = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(code[:8], "big") / 2**64


def _part(examples: LabelledSet, inside: Sequence[bool]) -> LabelledSet:
    chosen = tuple(example for example, keep in zip(examples.examples, inside, strict=True) if keep)
    return LabelledSet(examples=chosen, labels=examples.labels[np.array(inside, dtype=np.bool_)])


def digest(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of every field of all examples in hexadecimal; their order does not matter."""
    rows = sorted(json.dumps(asdict(example), sort_keys=True) for example in examples)
    return hashlib.sha256("\n".join(rows).encode("ascii")).hexdigest()

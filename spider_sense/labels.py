"""Which rows of a prompt set are positive for a detector, and which negative."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spider_sense.data import Example
from spider_sense.errors import ConfigError, DataError, nearest

__all__ = ["EXTRACTION", "INJECTION", "MISUSE", "NEGATIVE", "LabelMap", "LabelledSet", "labelled"]

SIDES = ("positive", "negative", "ignore")


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


def labelled(examples: Sequence[Example], label_map: LabelMap) -> LabelledSet:
    """Give each example its class and leave out those that have none.

    Args:
        examples: rows of any number of files.
        label_map: which labels are positive and negative.

    Raises:
        DataError: if a class is empty.
    """
    classes = [label_map.label(example) for example in examples]
    rows = [(example, label) for example, label in zip(examples, classes, strict=True) if label is not None]
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

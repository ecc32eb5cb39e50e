"""Answers with a label, refusal or not, out of prompt sets that carry responses.

What stands for a refusal, by the row's label:

- ``harmful``: the response, which such files keep only if it is safe, unless it begins like a compliance;
- ``harmful_noisy``: the response, if the phrase list finds a refusal in it;
- ``benign``: a compliance, if the phrase list finds no refusal.

Benign rows without a response can be answered by the model itself, so that the classifier knows its manner of speaking.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nest.answers import generate_answers
from nest.refusal import refuses
from nest.sample_answers import COMPLIANCES, REFUSALS
from nest.subsets import subset
from spider_sense.data import Example
from spider_sense.labels import NEGATIVE
from spider_sense.models import LoadedModel

__all__ = ["LabelledAnswer", "labelled_answers", "own_answers", "sample_answers"]

OWN_PER_SOURCE = 60
"""Prompts of a file that the model is asked."""
PER_SOURCE = 200
"""Answers of a file and class at most: one file's wording must not outweigh all others."""
_AFFIRMATIVE = re.compile(r"\W*(?:sure|of course|certainly|absolutely|here (?:is|are)|here's|yes)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """The text of an answer, and whether it refuses."""

    text: str
    refusal: bool
    source: str
    """Where it is from: the stem of a file, or ``written`` for those that come with this project."""


def sample_answers() -> list[LabelledAnswer]:
    """Return the answers that come with this project."""
    refusals = [LabelledAnswer(text, True, "written") for text in REFUSALS]
    return refusals + [LabelledAnswer(text, False, "written") for text in COMPLIANCES]


def labelled_answers(examples: Iterable[Example], seed: int = 0) -> list[LabelledAnswer]:
    """Return the answers of prompt sets whose label the module's rules can tell, at most 200 of a file and class.

    Args:
        examples: rows; those without a response are passed over.
        seed: which are taken where there are more.
    """
    kinds: dict[tuple[str, bool], list[Example]] = {}
    for example in examples:
        refusal = _refusal(example)
        if refusal is not None:
            kinds.setdefault((example.source, refusal), []).append(example)
    return [
        LabelledAnswer(example.response or "", refusal, source)
        for (source, refusal), rows in kinds.items()
        for example in _distinct(subset(rows, PER_SOURCE, seed, lambda row: row.id))
    ]


def own_answers(base: LoadedModel, examples: Iterable[Example], seed: int = 0) -> list[LabelledAnswer]:
    """Let a model answer benign rows that have no response, at most 60 of a file, and label the answers as above.

    Args:
        base: the model before anything was tuned.
        examples: rows; those with a response or another label are passed over.
        seed: which are taken where there are more.
    """
    files: dict[str, list[Example]] = {}
    for example in examples:
        if example.label in NEGATIVE and not (example.response or "").strip():
            files.setdefault(example.source, []).append(example)
    chosen = [row for rows in files.values() for row in subset(rows, OWN_PER_SOURCE, seed, lambda row: row.id)]
    texts = generate_answers(base, [row.turns or row.text for row in chosen])
    pairs = zip(chosen, texts, strict=True)
    return [LabelledAnswer(text, False, row.source) for row, text in pairs if text.strip() and not refuses(text)]


def _refusal(example: Example) -> bool | None:
    """Return whether the row's response refuses, None if no rule tells."""
    if not (example.response or "").strip():
        return None
    text, listed = str(example.response), refuses(str(example.response))
    match example.label:
        case "harmful":
            return None if _AFFIRMATIVE.match(text) else True
        case "harmful_noisy":
            return True if listed else None
        case "benign":
            return None if listed else False
    return None


def _distinct(rows: Sequence[Example]) -> list[Example]:
    """Return rows whose responses differ, so that none is trained on and tested on."""
    return list({row.response: row for row in rows}.values())

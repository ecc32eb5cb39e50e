"""Families of texts: what the tenants of one kind ask, or what one campaign asks.

The shipped ones are templates with slots, written for this project; others come from files of JSON lines.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import Field

from spider_sense.config import Settings, parse
from spider_sense.data import read_jsonl
from spider_sense.errors import DataError

__all__ = ["Family", "Kind", "load_families", "real_streams"]

Kind = Literal["chat", "app", "harness", "labelling", "tutoring", "campaign"]

_SLOT = re.compile(r"\{(\w+)\}")
_NUMBERS = {"n": (2, 60), "m": (2, 30)}
"""Slots that are numbers, and their ranges."""
_TRIES = 40
"""Draws for each text that is asked for; small families end sooner."""
_POOLS: Mapping[str, tuple[Kind, str, str]] = {
    "oasst": ("chat", "oasst_prompts", "benign"),
    "dolly": ("chat", "dolly_hhrlhf_small", "benign"),
    "self_instruct_user": ("chat", "self_instruct_user_oriented", "benign"),
    "vicuna": ("chat", "vicuna_bench", "benign"),
    "roleplay": ("chat", "gpteacher_roleplay", "benign"),
    "customer_service": ("app", "tau2_agent_requests", "benign"),
    "arc": ("harness", "util_arc_easy", "utility"),
    "commonsense": ("harness", "util_commonsense_qa", "utility"),
    "copa": ("harness", "util_copa", "utility"),
    "piqa": ("harness", "util_piqa", "utility"),
    "hellaswag": ("harness", "util_hellaswag", "utility"),
    "homework": ("tutoring", "extraction_trace_elicitation", "benign"),
    "gsm8k": ("campaign", "extraction_gsm8k_train", "extraction"),
    "math": ("campaign", "extraction_math_subset", "extraction"),
    "codegen": ("campaign", "extraction_gpteacher_codegen", "extraction"),
    "random_wiki": ("campaign", "extraction_random_wiki", "extraction"),
    "trace_elicitation": ("campaign", "extraction_trace_elicitation", "extraction"),
    "data_generation": ("campaign", "extraction_synthetic_data_prompts", "extraction"),
}
"""Name: kind, file, label of the rows that are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Texts of one kind of tenant or campaign."""

    name: str
    kind: Kind
    texts: tuple[str, ...]
    """Distinct."""
    system: str = ""
    wrappers: tuple[str, ...] = ("{payload}",)
    """Of a campaign; ``{payload}`` is where a text goes."""

    @property
    def has_template(self) -> bool:
        """Whether its requests share words that a wrapper brings."""
        return self.wrappers[0] != "{payload}"

    def wrapped(self) -> tuple[str, ...]:
        """Return the texts inside the first wrapper."""
        return tuple(self.wrappers[0].replace("{payload}", text) for text in self.texts)


class _Entry(Settings):
    name: str
    kind: Kind = "campaign"
    system: str = ""
    wrappers: tuple[str, ...] = ("{payload}",)
    templates: tuple[str, ...]
    slots: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class _Document(Settings):
    families: tuple[_Entry, ...]


def load_families(texts: int, data: Path | None = None, longest: int = 400) -> tuple[Family, ...]:
    """Return every family, the shipped ones first, in an order that is the same everywhere.

    Args:
        texts: of a family at most.
        data: folder of prompt sets; without it only the shipped families are there.
        longest: characters of a text from a file; longer ones are left out.

    Raises:
        DataError: if the folder lacks a file.
    """
    return (*_shipped(texts), *(_pool(name, data, texts, longest) for name in _POOLS if data is not None))


def real_streams(data: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the real benign streams of a folder: principal to its family and its texts in their order.

    Raises:
        DataError: if ``streams_benign.jsonl`` is not there.
    """
    path = data / "streams_benign.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name the folder of prompt sets") from error
    streams: dict[str, tuple[str, list[str]]] = {}
    for row in rows:
        streams.setdefault(row["principal"], (row["family"], []))[1].append(row["text"])
    return {principal: (family, tuple(texts)) for principal, (family, texts) in streams.items()}


def _shipped(texts: int) -> list[Family]:
    folder = files(__package__) / "data"
    families = []
    for name in ("benign.yaml", "campaigns.yaml"):
        entries = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        for entry in parse({"families": entries}, _Document, origin=name).families:
            made = tuple(filled(entry.templates, entry.slots, texts, f"{entry.name}:{entry.kind}"))
            # What a wrapper has to fill is the campaign's choice, not the request's.
            wrappers = tuple(wrapper.replace("{n}", "6") for wrapper in entry.wrappers)
            wrappers = tuple(_fill(wrapper, entry.slots, np.random.default_rng(7)) for wrapper in wrappers)
            families.append(
                Family(name=entry.name, kind=entry.kind, texts=made, system=entry.system, wrappers=wrappers)
            )
    return families


def _pool(name: str, data: Path | None, texts: int, longest: int) -> Family:
    assert data is not None
    kind, file, label = _POOLS[name]
    rows = [row.text for row in read_jsonl(data / f"{file}.jsonl") if row.label == label]
    # Prompts that ask for whole data sets are long; the shortest ones stand for them.
    limit = max(longest, sorted(map(len, rows))[min(len(rows), 60) - 1])
    kept = list(dict.fromkeys(text for text in rows if len(text) <= limit))
    order = np.random.default_rng(_seed(name)).permutation(len(kept))[:texts]
    return Family(name=name, kind=kind, texts=tuple(kept[index] for index in sorted(order)))


def filled(templates: Sequence[str], slots: Mapping[str, Sequence[str]], count: int, seed: str) -> list[str]:
    """Return up to ``count`` distinct texts, the templates in turn with random values in their slots."""
    generator = np.random.default_rng(_seed(seed))
    found: dict[str, None] = {}
    for template in itertools.islice(itertools.cycle(templates), count * _TRIES):
        found.setdefault(_fill(template, slots, generator))
        if len(found) == count:
            break
    return list(found)


def _fill(template: str, slots: Mapping[str, Sequence[str]], generator: np.random.Generator) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in slots:
            return slots[name][int(generator.integers(len(slots[name])))]
        return str(generator.integers(*_NUMBERS[name])) if name in _NUMBERS else match[0]

    return _SLOT.sub(value, template)


def _seed(name: str) -> list[int]:
    return list(name.encode())

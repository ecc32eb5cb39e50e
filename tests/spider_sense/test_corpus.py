"""The prompt set in the package: its size, its pairing, and that no length gives a pair away."""

import re
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from spider_sense.corpus import load_corpus, load_tool_outputs
from spider_sense.data import Example
from spider_sense.labels import EXTRACTION, INJECTION, MISUSE, LabelMap, labelled

CATEGORIES = {
    "chemical_biological",
    "cybercrime",
    "disinformation",
    "fraud",
    "hate_harassment",
    "illegal_drugs",
    "privacy_stalking",
    "professional_malpractice",
    "self_harm",
    "theft_property",
    "violence",
    "weapons",
}


@pytest.fixture(scope="module")
def corpus() -> list[Example]:
    return load_corpus()


@pytest.fixture(scope="module")
def pairs(corpus: list[Example]) -> list[tuple[Example, Example]]:
    rows = [row for row in corpus if row.source == "corpus_pairs"]
    harmful = {row.group: row for row in rows if row.label == "harmful"}
    benign = {row.group: row for row in rows if row.label == "benign"}
    assert harmful.keys() == benign.keys()
    assert len(rows) == 2 * len(harmful)
    return [(harmful[group], benign[group]) for group in harmful]


def word_count(row: Example) -> int:
    return len(row.text.split())


def words(row: Example) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", row.text.lower()))


def auroc(positive: NDArray[np.int64], negative: NDArray[np.int64]) -> float:
    values, inverse, counts = np.unique(np.concatenate([positive, negative]), return_inverse=True, return_counts=True)
    assert len(values) > 1
    midranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    wins = midranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))


def test_auroc_by_midranks() -> None:
    assert auroc(np.array([2, 3]), np.array([0, 1])) == 1.0
    assert auroc(np.array([1, 2]), np.array([1, 0])) == 0.875


def test_there_are_enough_pairs_in_every_category(pairs: list[tuple[Example, Example]]) -> None:
    counts = Counter(harmful.category for harmful, _ in pairs)
    assert counts.keys() == CATEGORIES
    assert counts.total() >= 500
    assert min(counts.values()) >= 40
    assert all(harmful.category == benign.category for harmful, benign in pairs)


def test_there_are_enough_single_rows(corpus: list[Example]) -> None:
    sources = Counter(row.source for row in corpus)
    assert sources.keys() == {"corpus_pairs", "corpus_everyday", "corpus_special"}
    assert sources["corpus_everyday"] >= 300
    assert sources["corpus_special"] >= 60
    assert {row.label for row in corpus if row.source == "corpus_everyday"} == {"benign"}


@pytest.mark.parametrize("label_map", [MISUSE, INJECTION, EXTRACTION])
def test_every_detector_has_both_classes(corpus: list[Example], label_map: LabelMap) -> None:
    assert len(labelled(corpus, label_map)) > 300


def test_ids_and_texts_are_unique(corpus: list[Example]) -> None:
    assert len({row.id for row in corpus}) == len(corpus)
    assert len({" ".join(row.text.lower().split()) for row in corpus}) == len(corpus)


def test_texts_are_plain_ascii(corpus: list[Example]) -> None:
    assert [row.id for row in corpus if not row.text.isascii() or row.text != row.text.strip()] == []


def test_the_sides_of_a_pair_are_about_as_long(pairs: list[tuple[Example, Example]]) -> None:
    counts = [(harmful.group, word_count(harmful), word_count(benign)) for harmful, benign in pairs]
    assert [row for row in counts if max(row[1:]) > 1.3 * min(row[1:])] == []


def test_the_sides_of_a_pair_share_words(pairs: list[tuple[Example, Example]]) -> None:
    assert [harmful.group for harmful, benign in pairs if len(words(harmful) & words(benign)) < 2] == []


def test_length_alone_does_not_tell_the_sides_apart(pairs: list[tuple[Example, Example]]) -> None:
    harmful = np.array([word_count(harmful) for harmful, _ in pairs])
    benign = np.array([word_count(benign) for _, benign in pairs])
    assert 0.4 < auroc(harmful, benign) < 0.6


@pytest.fixture(scope="module")
def outputs() -> list[tuple[Example, Example]]:
    rows = load_tool_outputs()
    assert [row.label for row in rows] == ["injection", "benign"] * (len(rows) // 2)
    return list(zip(rows[::2], rows[1::2], strict=True))


def test_there_are_enough_outputs_of_many_tools(outputs: list[tuple[Example, Example]]) -> None:
    assert len(outputs) >= 150
    assert len({injected.category for injected, _ in outputs}) >= 20
    assert all(injected.group == benign.group for injected, benign in outputs)
    assert len({row.text for pair in outputs for row in pair}) == 2 * len(outputs)
    assert all(row.text.isascii() for pair in outputs for row in pair)


def test_the_sides_of_an_output_differ_in_one_place_and_are_about_as_long(
    outputs: list[tuple[Example, Example]],
) -> None:
    injected = np.array([word_count(row) for row, _ in outputs])
    benign = np.array([word_count(row) for _, row in outputs])
    assert (np.maximum(injected, benign) <= 1.6 * np.minimum(injected, benign)).all()
    assert 0.4 < auroc(injected, benign) < 0.6
    assert all(len(words(one) & words(other)) >= 2 for one, other in outputs)


def test_an_output_comes_with_the_task_and_the_call(outputs: list[tuple[Example, Example]]) -> None:
    for injected, benign in outputs:
        assert injected.turns is not None
        assert benign.turns is not None
        assert [role for role, _ in injected.turns] == ["user", "assistant", "tool"]
        assert injected.turns[:2] == benign.turns[:2]
        assert injected.turns[2][1] == injected.text

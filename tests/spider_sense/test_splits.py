"""Splits: complete, stratified, by group."""

from collections import Counter
from collections.abc import Sequence

import pytest

from spider_sense.data import Example
from spider_sense.errors import ConfigError
from spider_sense.labels import MISUSE, LabelledSet, labelled
from spider_sense.splits import split
from tests.prompt_rows import example, many

FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}


def ids(part: LabelledSet) -> set[str]:
    return {row.id for row in part.examples}


def parts_by_id(rows: Sequence[Example], seed: int = 0) -> dict[str, str]:
    parts = split(labelled(rows, MISUSE), FRACTIONS, seed)
    return {name: part for part, subset in parts.items() for name in ids(subset)}


def test_a_split_is_complete_and_keeps_labels_with_their_rows() -> None:
    whole = labelled(many("a", 100), MISUSE)
    parts = split(whole, FRACTIONS, seed=0)
    assert list(parts) == ["train", "validation", "test"]
    assert sum(len(part) for part in parts.values()) == 100
    assert set().union(*map(ids, parts.values())) == ids(whole)
    for part in parts.values():
        assert part.labels.tolist() == [MISUSE.label(row) for row in part.examples]


def test_a_split_is_stratified_by_source_and_label() -> None:
    parts = split(labelled(many("a", 200) + many("b", 40), MISUSE), FRACTIONS, seed=0)
    for name, fraction in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        counts = Counter((row.source, row.label) for row in parts[name].examples)
        for stratum, size in {("a", "harmful"): 50, ("a", "benign"): 150, ("b", "harmful"): 10}.items():
            assert abs(counts[stratum] - fraction * size) <= 1


def test_a_split_never_separates_a_group() -> None:
    rows = [example(f"{n}-{label}", label, group=f"pair-{n}") for n in range(60) for label in ("harmful", "benign")]
    parts = parts_by_id(rows)
    assert all(parts[f"{n}-harmful"] == parts[f"{n}-benign"] for n in range(60))


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    rows = many("a", 100)
    assert parts_by_id(rows) == parts_by_id(rows[::-1])
    assert parts_by_id(rows) != parts_by_id(rows, seed=1)


def test_another_file_moves_no_row() -> None:
    alone, together = parts_by_id(many("a", 77)), parts_by_id(many("b", 31) + many("a", 77))
    assert alone == {name: part for name, part in together.items() if name.startswith("a-")}


def test_strata_of_one_row_do_not_all_go_to_one_part() -> None:
    rows = [example(f"{n}", "benign" if n % 2 else "harmful", source=f"source-{n}") for n in range(200)]
    counts = Counter(parts_by_id(rows).values())
    assert 90 < counts["train"] < 150
    assert min(counts["validation"], counts["test"]) > 20


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 1.2, "test": -0.2}, {"train": 1.0, "test": 0.0}])
def test_bad_fractions_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="cannot split by"):
        split(labelled(many("a", 8), MISUSE), fractions, seed=0)

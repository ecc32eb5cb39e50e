"""Which rows of which files are on which side."""

import json
from collections import Counter
from pathlib import Path

import pytest

from nest.prompts import load_prompts
from spider_sense.errors import DataError


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    labels = ["harmful", "jailbreak", "benign", "utility", "noncompliance_other", None]
    rows = [{"text": f"text {n}"} | ({"label": label} if label else {}) for n, label in enumerate(labels)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "mixed.jsonl")


def test_the_label_decides_and_a_row_without_one_is_taken(mixed: str) -> None:
    harmful, benign = load_prompts([mixed], "harmful"), load_prompts([mixed], "benign")
    assert [example.text for example in harmful.examples] == ["text 0", "text 1", "text 5"]
    assert [example.text for example in benign.examples] == ["text 2", "text 3", "text 5"]
    assert harmful.left_out == Counter(benign=1, utility=1, noncompliance_other=1)


def test_the_corpus_has_matched_pairs() -> None:
    harmful, benign = load_prompts(["corpus"], "harmful"), load_prompts(["corpus"], "benign")
    assert len(harmful.examples) >= 500
    assert [example.group for example in harmful.examples] == [example.group for example in benign.examples]
    assert not harmful.left_out


def test_a_limit_keeps_pairs_together_and_depends_on_the_seed() -> None:
    sides = [load_prompts(["corpus"], side, 40).examples for side in ("harmful", "benign")]
    assert [len(side) for side in sides] == [40, 40]
    assert [example.group for example in sides[0]] == [example.group for example in sides[1]]
    other = load_prompts(["corpus"], "harmful", 40, seed=1).examples
    assert {example.id for example in other} != {example.id for example in sides[0]}


def test_a_limit_above_the_number_of_rows_keeps_all(mixed: str) -> None:
    assert len(load_prompts([mixed], "harmful", 100).examples) == 3


def test_files_are_joined_in_order(mixed: str) -> None:
    examples = load_prompts([mixed, "corpus"], "benign").examples
    assert [example.source for example in examples[:4]] == ["mixed"] * 3 + ["corpus_pairs"]


def test_a_file_without_the_side_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nice.jsonl"
    path.write_text('{"text": "hello", "label": "benign"}')
    with pytest.raises(DataError, match=r"no harmful prompt in .*nice\.jsonl: the labels are {'benign': 1}"):
        load_prompts([str(path)], "harmful")
    with pytest.raises(DataError, match="cannot read"):
        load_prompts([str(tmp_path / "nowhere.jsonl")], "harmful")

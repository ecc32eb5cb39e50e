from pathlib import Path
from typing import Any

import pytest

from spider_sense.corpus import load_corpus, load_evasion
from spider_sense.data import digest
from spider_sense.reporting.samples import samples
from spider_sense.training.config import TrainConfig
from spider_sense.training.parts import choose_parts


def record(config: TrainConfig) -> dict[str, Any]:
    parts = choose_parts(config)
    return {"config": config.model_dump(mode="json", exclude={"output", "work"}), "data_digest": digest(parts.examples)}


def assert_pairs(groups: list[str], labels: list[str]) -> None:
    assert len(groups) == 6
    assert len(set(groups)) == 3
    assert labels == ["harmful", "benign"] * 3


def test_the_test_part_is_shown_where_the_split_can_be_computed_again() -> None:
    config = TrainConfig()
    rows, origin = samples(record(config))
    assert_pairs([row.group for row in rows], [row.label for row in rows])
    assert "test part" in origin
    seen = {row.text for row in choose_parts(config).examples}
    assert not seen & {row.text for row in rows}


def test_with_test_files_of_its_own_the_calibration_part_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text('{"id": "a", "text": "one", "label": "benign"}\n{"id": "b", "text": "two", "label": "harmful"}\n')
    config = TrainConfig(test=(str(file),))
    rows, origin = samples(record(config))
    assert "calibration part" in origin
    parts = choose_parts(config)
    part = {row.text: name for row, name in zip(parts.examples, parts.part.tolist(), strict=True)}
    assert {part[row.text] for row in rows} == {"calibration"}


@pytest.mark.parametrize("change", [{"data_digest": "0" * 64}, {"config": {"data": ["/nowhere.jsonl"]}}, {"config": 3}])
def test_otherwise_pairs_that_no_run_reads(change: dict[str, Any]) -> None:
    rows, origin = samples(record(TrainConfig()) | change)
    assert_pairs([row.group for row in rows], [row.label for row in rows])
    assert "no training run reads" in origin
    assert {row.text for row in rows} <= {row.text for row in load_evasion()}
    assert not {row.text for row in rows} & {row.text for row in load_corpus()}


def test_a_guard_without_a_record_is_served_too() -> None:
    assert len(samples({})[0]) == 6

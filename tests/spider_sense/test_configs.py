"""The YAML files that ship run as they are."""

import os
from pathlib import Path

import pytest

from spider_sense.config import load_yaml
from spider_sense.extraction.settings import ExtractionSettings
from spider_sense.policy import Policy
from spider_sense.training.config import TrainConfig
from spider_sense.training.parts import choose_parts

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train*.yaml")), ids=lambda path: path.name)
def test_training_files_are_valid(path: Path) -> None:
    assert load_yaml(path, TrainConfig).model == "smollm2"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("policy*.yaml")), ids=lambda path: path.name)
def test_policy_files_are_valid(path: Path) -> None:
    assert load_yaml(path, Policy).rules


def test_the_extraction_file_is_valid() -> None:
    assert load_yaml(CONFIGS / "extraction.yaml", ExtractionSettings).retention_days == 90


@pytest.mark.skipif("SPIDER_SENSE_DATA" not in os.environ, reason="SPIDER_SENSE_DATA names no folder of prompt sets")
def test_the_full_run_keeps_its_test_files_apart() -> None:
    parts = choose_parts(load_yaml(CONFIGS / "train-full.yaml", TrainConfig))
    used = {" ".join(row.text.lower().split()) for row in parts.examples}
    tested = {" ".join(row.text.lower().split()) for rows in parts.test.values() for row in rows}
    assert len(parts.test) == 12
    assert used
    assert not used & tested
    # Wrappers around a payload: neither it nor another wrapper of the kind is trained on.
    wrapped = [row.text for row in parts.test["jailbreak_templates"]]
    assert not [
        row.text for row in parts.examples if row.source == "alpaca_seed_tasks" and row.text in "\n".join(wrapped)
    ]
    assert not {row.source for row in parts.examples} & set(parts.test)
    groups: dict[str, set[str]] = {}
    for row, part in zip(parts.examples, parts.part.tolist(), strict=True):
        groups.setdefault(row.group, set()).add(part)
    assert all(len(found) == 1 for found in groups.values())

"""Which prompt sets a training run reads."""

import json
from pathlib import Path

import pytest

from spider_sense.errors import ConfigError
from spider_sense.training.config import read_sets


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Write the sets ``a`` and ``b``, and another that is called ``b`` too."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in ((first, "ab"), (second, "b")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"{folder.name} {name}", "label": "benign"}))
    return first, second


def test_what_is_tested_on_is_left_out_of_a_pattern(folders: tuple[Path, Path]) -> None:
    first, _ = folders
    assert set(read_sets((str(first / "*.jsonl"),))) == {"a", "b"}
    around = str(first / ".." / "first" / "b.jsonl")
    assert set(read_sets((str(first / "*.jsonl"),), without=(around,))) == {"a"}


def test_another_file_of_the_same_name_is_not_left_out_but_refused(folders: tuple[Path, Path]) -> None:
    first, second = folders
    with pytest.raises(ConfigError, match="two files are called 'b'; rename one"):
        read_sets((str(first / "*.jsonl"),), without=(str(second / "b.jsonl"),))
    with pytest.raises(ConfigError, match="two files are called 'b'"):
        read_sets((str(first / "*.jsonl"), str(second / "*.jsonl")))


def test_a_pattern_that_matches_nothing_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="matches no file"):
        read_sets((str(folders[0] / "*.json"),))
    with pytest.raises(ConfigError, match="environment variable that is not set"):
        read_sets(("$NO_SUCH_FOLDER/a.jsonl",))

"""Reading utility tasks, and every way in which a file can be wrong."""

import json
from pathlib import Path

import pytest

from nest.tasks import read_tasks
from spider_sense.errors import DataError

CHOICE = {"id": "a", "text": "Question: w1", "choices": ["w2", "w3"], "gold": 1}
LAST = {"text": "w1 w2", "continuation": "w3"}
DOCUMENT = {"text": "w1 w2 w3"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_the_kind_is_told_by_the_fields(tmp_path: Path) -> None:
    write(tmp_path / "util_arc_challenge.jsonl", CHOICE)
    write(tmp_path / "util_last.jsonl", LAST)
    write(tmp_path / "util_text.jsonl", DOCUMENT)
    write(tmp_path / "other.jsonl", CHOICE)
    arc, last, text = read_tasks([tmp_path])
    assert (arc.kind, last.kind, text.kind) == ("choice", "last_word", "documents")
    assert (arc.normalised, last.normalised) == (True, False)
    assert arc.rows[0].choices == ("w2", "w3")
    assert arc.rows[0].gold == 1
    assert last.rows[0].id == "util_last-1"
    assert last.rows[0].choices == ("w3",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", "b"], "gold": 0}, "needs a 'text'"),
        ([1], "needs a 'text'"),
        ({**CHOICE, "gold": 2}, "gold is 2; it must be the place of the right choice, 0 to 1"),
        ({**CHOICE, "gold": "B"}, "gold is 'B'"),
        ({**CHOICE, "choices": ["a"]}, "two or more texts"),
        ({**CHOICE, "choices": ["a", " "]}, "two or more texts"),
        ({**LAST, "continuation": ""}, "the continuation is ''"),
        ({**LAST, "context_options": ["a", "b"]}, "context_options"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "task.jsonl", CHOICE, row)
    with pytest.raises(DataError, match="line 2: ") as error:
        read_tasks([path])
    assert message in str(error.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no util_\*.jsonl"):
        read_tasks([tmp_path])
    with pytest.raises(DataError, match="cannot read"):
        read_tasks([tmp_path / "missing.jsonl"])
    with pytest.raises(DataError, match="choice, last_word"):
        read_tasks([write(tmp_path / "mixed.jsonl", CHOICE, LAST)])
    with pytest.raises(DataError, match="no rows"):
        read_tasks([write(tmp_path / "empty.jsonl")])
    (tmp_path / "not.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1"):
        read_tasks([tmp_path / "not.jsonl"])
    once = write(tmp_path / "once.jsonl", CHOICE)
    with pytest.raises(DataError, match="two utility files are called 'once'"):
        read_tasks([once, once])

"""Prompt sets: what a row holds, and how faults are told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spider_sense.data import Example, digest, read_jsonl
from spider_sense.errors import DataError
from spider_sense.labels import MISUSE
from tests.prompt_rows import many


def write(folder: Path, *rows: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_is_read_whole(tmp_path: Path) -> None:
    row = {"id": "a", "text": "hi", "label": "benign", "category": "c", "response": "ho", "source": "x", "gold": 3}
    assert read_jsonl(write(tmp_path, row)) == [
        Example(
            id="a",
            text="hi",
            label="benign",
            category="c",
            source="prompts",
            group="prompts:a",
            response="ho",
            turns=None,
        )
    ]


def test_a_row_without_an_id_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"text": "a", "label": "x"}\n\n{"text": "b\u2028c", "label": "x"}', encoding="utf-8")
    assert [(row.id, row.text) for row in read_jsonl(path)] == [("prompts-1", "a"), ("prompts-3", "b\u2028c")]


def test_rows_of_a_pair_share_a_group(tmp_path: Path) -> None:
    rows = [{"text": text, "label": "x", "pair": pair} for text, pair in (("a", 0), ("b", 0), ("c", 1))]
    groups = [row.group for row in read_jsonl(write(tmp_path, *rows))]
    assert groups[0] == groups[1] != groups[2]


def test_messages_become_turns(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    alone, beside = read_jsonl(
        write(
            tmp_path,
            {"messages": messages, "label": "x"},
            {"messages": messages, "text": "Hi", "label": "x"},
        )
    )
    assert alone.turns == beside.turns == (("system", "Be kind."), ("user", "Hi"))
    assert (alone.text, beside.text) == ("Be kind.\n\nHi", "Hi")


def test_a_label_may_be_left_out_if_the_caller_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"})
    (row,) = read_jsonl(path, require_label=False)
    assert row.label == ""
    assert MISUSE.label(row) is None
    with pytest.raises(DataError, match="line 1: the label is None"):
        read_jsonl(path)


GOOD = {"id": "a", "text": "t", "label": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "x"}, "the text is None; a row needs a 'text'"),
        ({"text": " \n", "label": "x"}, "the text is ' "),
        ({"text": 3, "label": "x"}, "the text is 3"),
        ({"text": "t", "label": 1}, "the label is 1; it must be a string"),
        ({"text": "t", "label": None}, "the label is None"),
        ({"id": "a", "text": "t", "label": "x"}, "the id 'a' is already on line 1"),
        (["text"], "holds \\['text'\\], not an object"),
        ({"messages": [], "label": "x"}, "a message is None"),
        ({"messages": "hi", "label": "x"}, "a message is None"),
        ({"messages": [{"role": "user"}], "label": "x"}, "a message is {'role': 'user'}"),
        ({"messages": [{"role": "user", "content": ""}], "label": "x"}, "the text is ''"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"prompts\.jsonl, line 2: {message}"):
        read_jsonl(write(tmp_path, GOOD, row))


@pytest.mark.parametrize("line", [b'{"text": "a"', b'{"text": "\xff", "label": "x"}', b"nonsense"])
def test_bad_json_is_named_by_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n\n" + line)
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 3: "):
        read_jsonl(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent\.jsonl: No such file"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_the_digest_sees_every_field_but_not_the_order() -> None:
    rows = many("a", 5)
    assert digest(rows) == digest(rows[::-1])
    changes: list[dict[str, object]] = [
        {"text": "other"},
        {"label": "other"},
        {"response": "other"},
        {"turns": (("user", "other"),)},
        {"group": "other"},
    ]
    changed = {digest([replace(rows[0], **change), *rows[1:]]) for change in changes}  # type: ignore[arg-type]
    assert len(changed | {digest(rows), digest(rows[1:])}) == len(changes) + 2

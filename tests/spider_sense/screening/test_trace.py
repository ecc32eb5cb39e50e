"""Recorded conversations: what is read, and how a bad line is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from spider_sense.errors import DataError
from spider_sense.screening.message import Message, parse_object
from spider_sense.screening.trace import read_traces

CALL = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"q": "x"}'}}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_traces(tmp_path: Path) -> None:
    whole: dict[str, Any] = {
        "id": 7,
        "principal": "ann",
        "model": "x",
        "tools": [{"type": "function", "function": {"name": "search"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "tool_call_id": "c1", "content": "found"},
        ],
    }
    first, second = read_traces(write(tmp_path / "t.jsonl", whole, "", [{"role": "user", "content": "hi"}]))
    assert (first.id, first.principal, first.tools) == ("7", "ann", tuple(whole["tools"]))
    assert first.messages[0].content == "one\ntwo"
    assert first.messages[1].tool_calls[0].arguments == {"q": "x"}
    assert first.messages[1].dump() == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert (second.id, second.principal, second.messages[0].content) == ("t-3", None, "hi")
    assert second.tools is None
    (none,) = read_traces(write(tmp_path / "n.jsonl", whole | {"tools": []}))
    assert none.tools == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ("3", "line 1: has no messages"),
        ({"messages": []}, "line 1: has no messages"),
        ({"messages": [3]}, "line 1, message 0: Input should be"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "line 1, message 0: role: "),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0: content: "),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 0: content: .* half a character"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts that are not text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, r"message 0: tool_calls\.0\.function"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": ["search"]}, "tools is not a list of JSON schemas"),
        ({"messages": [{"role": "user", "content": "x"}], "principal": 3}, "principal is 3, not a name"),
    ],
)
def test_bad_lines(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_traces(write(tmp_path / "t.jsonl", line)))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name a file of JSON lines"):
        list(read_traces(tmp_path / "none.jsonl"))


def test_an_envelope_is_never_rendered() -> None:
    sent = Message.parse({"role": "user", "content": "x", "envelope": {"sender": "ann"}})
    assert sent.envelope == {"sender": "ann"}
    assert sent.dump() == {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    "text",
    ["", '{"a": "\\ud800"}', "1", '{"a": 1} {}', '{"a": 1, "a": 1}', '{"a": Infinity}', '{"a": {"b": 1, "b": 2}}'],
)
def test_what_is_not_one_object(text: str) -> None:
    assert parse_object(text) is None

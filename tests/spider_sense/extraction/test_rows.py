"""Logs: what is read, and what is refused with the line."""

import json
from pathlib import Path
from typing import Any

import pytest

from spider_sense.errors import DataError
from spider_sense.extraction.row_faults import ALLOWED
from spider_sense.extraction.rows import Row, read_rows, streams_of

GOOD = {"principal": "key-1", "time": 5, "text": "How do I poach an egg?"}


def _log(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    return path


def test_a_row_is_read_with_everything_in_it(tmp_path: Path) -> None:
    rich = GOOD | {
        "time": "2026-01-01T00:00:00",
        "tenant": "app",
        "parameters": {"temperature": 0.2},
        "links": {"payment": "card", "network": "AS1"},
        "logit_bias": {"50": 100, "7": -100},
        "top_logprobs": 5,
        "something": "else",
    }
    (row,) = read_rows(_log(tmp_path, rich))
    assert row.time == 1767225600.0
    assert row.logit_bias == (50, 7)
    assert row.links == {"payment": "card", "network": "AS1"}
    assert row.words == row.prompt == GOOD["text"]


def test_messages_stand_for_a_text(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (row,) = read_rows(_log(tmp_path, {"principal": 17, "time": 1, "messages": messages}))
    assert (row.principal, row.words, row.prompt) == ("17", "Two?", tuple(turns))


def test_streams_are_in_the_order_of_time(tmp_path: Path) -> None:
    rows = read_rows(_log(tmp_path, *[GOOD | {"time": time, "text": str(time)} for time in (3, 1, 2, 1)]))
    assert [row.time for row in streams_of(rows)["key-1"]] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([1], "not an object"),
        ({"time": 1, "text": "x"}, "'principal' is missing; add it"),
        (GOOD | {"principal": ""}, "principal: '' is not allowed; give a name"),
        (GOOD | {"time": "yesterday"}, "'yesterday' is no date"),
        (GOOD | {"time": None}, "time: None is not allowed; give seconds since 1970"),
        (GOOD | {"time": float("nan")}, "time: nan is not allowed"),
        (GOOD | {"hidden": [0.5, float("nan")]}, r"hidden\.1: nan is not allowed; give a list of finite numbers"),
        (GOOD | {"hidden": [1.0, -2.0, 2.0]}, r"hidden: its root mean square is 1\.73, at most 1 .* mean .* h / rms"),
        ({"principal": "a", "time": 1}, "no text, messages, hidden or sketch"),
        (GOOD | {"messages": [{"role": "user", "content": "x"}]}, "a text and messages"),
        (GOOD | {"links": {"shoe size": "44"}}, "links"),
        (GOOD | {"logit_bias": {"word": 1}}, "logit_bias.0: 'word' is not allowed; give token ids"),
        (GOOD | {"logit_bias": [-1]}, "logit_bias"),
        (GOOD | {"max_tokens": -1}, "max_tokens: -1 is not allowed; give a whole number from 0"),
        (GOOD | {"n": 0}, "n: 0 is not allowed; give a whole number from 1 to 65,536"),
        (GOOD | {"time": 1767225600000}, "time: 1767225600000 is not allowed; give seconds since 1970, not millisec"),
        (GOOD | {"tenant": "a type of more than 24 letters"}, "tenant: .* at most 24 printable ASCII characters"),
        ({"hashed_ip": "x", "conversation": ["hi"]}, "a turn: 'hi' is not allowed; give a list of"),
        ({"hashed_ip": "x", "conversation": [{"role": "user", "content": "hi"}]}, "no timestamp"),
        ({"hashed_ip": "x", "conversation": None}, "conversation is no list"),
        ({"hashed_ip": "x", "conversation": [], "header": "Mozilla"}, "header no object"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, bad: Any, says: str) -> None:
    with pytest.raises(DataError, match=rf"log\.jsonl, line 2: .*{says}"):
        read_rows(_log(tmp_path, GOOD, bad))


def test_a_file_that_is_missing_empty_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no request"):
        read_rows(_log(tmp_path))
    (tmp_path / "log.jsonl").write_text("{not json", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: '{not json' .* at character 1.*give one JSON object a line"):
        read_rows(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_bytes(b'\n{"principal": "\xe9"}')
    with pytest.raises(DataError, match=r"line 2: .* is no UTF-8; give one JSON object a line"):
        read_rows(tmp_path / "log.jsonl")


def test_fields_that_are_null_are_left_out(tmp_path: Path) -> None:
    optional = {name: None for name in Row.model_fields if name not in GOOD}
    assert read_rows(_log(tmp_path, GOOD | optional)) == read_rows(_log(tmp_path, GOOD))


def test_a_mean_of_normed_vectors_may_be_rounded(tmp_path: Path) -> None:
    hidden = {"principal": "a", "time": 1, "hidden": [1.004, -1.004]}
    assert read_rows(_log(tmp_path, hidden))[0].hidden == (1.004, -1.004)


@pytest.mark.parametrize("stamp", ["2023-04-09 00:02:53+00:00", 1680998573000, 1680998573])
def test_a_conversation_of_wildchat_is_a_request_a_turn(tmp_path: Path, stamp: object) -> None:
    record = {
        "conversation_hash": "c",
        "hashed_ip": "abc",
        "timestamp": stamp,
        "header": {"user-agent": "Mozilla", "accept-language": "de"},
        "conversation": [
            {"role": "user", "content": "One?", "turn_identifier": 1},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "Two?"},
        ],
    }
    first, second = read_rows(_log(tmp_path, record))
    assert (first.principal, first.time, first.words) == ("abc", 1680998573.0, "One?")
    assert second.prompt == (("user", "One?"), ("assistant", "1"), ("user", "Two?"))
    assert second.links == {"client": "de Mozilla"}


def test_every_field_has_words_for_what_it_may_hold() -> None:
    assert set(ALLOWED) == set(Row.model_fields)

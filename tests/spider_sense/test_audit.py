"""The audit log: one valid JSON object a line, whatever happens."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TextIO

import pytest
from pydantic import ValidationError

from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.errors import ConfigError
from spider_sense.types import Coverage

FULL = Path("/dev/full")


def event(**changes: Any) -> AuditEvent:
    fields: dict[str, Any] = {
        "request": "r-1",
        "event": "verdict",
        "detector": "misuse",
        "zone": "breach",
        "score": 2.5,
        "threshold": 1.0,
        "position": 12,
        "coverage": Coverage(scored=13, missing=0),
        "guard": "abc",
    }
    return AuditEvent(**fields | changes)


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()]


def test_an_event_is_one_line_with_every_field(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        log.write(event(time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), action="stop", reason="a\nb"))
    assert lines(path) == [
        {
            "time": "2026-01-02T03:04:05Z",
            "request": "r-1",
            "principal": None,
            "event": "verdict",
            "detector": "misuse",
            "zone": "breach",
            "score": 2.5,
            "threshold": 1.0,
            "position": 12,
            "coverage": {"scored": 13, "cached": 0, "missing": 0},
            "action": "stop",
            "reason": "a\nb",
            "patched_from": None,
            "guard": "abc",
        }
    ]


def test_time_is_now_in_utc_and_other_zones_are_converted() -> None:
    assert abs(event().time - datetime.now(UTC)) < timedelta(minutes=1)
    there = datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=2)))
    assert event(time=there).model_dump(mode="json")["time"] == "2026-01-02T01:00:00Z"
    with pytest.raises(ValidationError, match="timezone"):
        event(time=datetime(2026, 1, 2, 3))


@pytest.mark.parametrize(("score", "written"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (0.0, 0.0)])
def test_every_score_is_valid_json_and_reads_back(tmp_path: Path, score: float, written: float | str) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        log.write(event(score=score, threshold=score))
    (line,) = lines(path)
    assert (line["score"], line["threshold"]) == (written, written)
    read = AuditEvent.model_validate_json(path.read_text("utf-8"))
    assert read.score is not None
    assert repr(read.score) == repr(score)


def test_text_is_written_only_if_asked_for(tmp_path: Path) -> None:
    silent, full = tmp_path / "silent.jsonl", tmp_path / "full.jsonl"
    with AuditLog(silent) as log:
        log.write(event(text="the prompt"))
    with AuditLog(full, include_text=True) as log:
        log.write(event(text="the prompt"))
    assert "the prompt" not in silent.read_text("utf-8")
    assert lines(full)[0]["text"] == "the prompt"


def test_hostile_text_stays_on_its_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    hostile = 'a"}\r\n{"event": "close"}\u2028\x00\ud800'
    with AuditLog(path, include_text=True) as log:
        log.write(event(text=hostile))
    assert [line["text"] for line in lines(path)] == [hostile]


def test_a_line_is_there_before_the_log_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        log.write(event())
        assert len(lines(path)) == 1


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for request in ("a", "b"):
        with AuditLog(path) as log:
            log.write(event(request=request))
    assert [line["request"] for line in lines(path)] == ["a", "b"]


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"request": "cut sh', encoding="utf-8")
    with AuditLog(path) as log:
        log.write(event(request="after"))
    assert json.loads(path.read_text("utf-8").splitlines()[1])["request"] == "after"


class SlowFile:
    """Hands a line over in two halves, with time between them for another thread."""

    def __init__(self, inner: TextIO) -> None:
        self.inner = inner

    def write(self, line: str) -> None:
        middle = len(line) // 2
        self.inner.write(line[:middle])
        time.sleep(0.002)
        self.inner.write(line[middle:])


def test_threads_do_not_mix_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    names = [f"request-{number}" for number in range(40)]
    with AuditLog(path) as log:
        with monkeypatch.context() as patch, ThreadPoolExecutor(8) as pool:
            patch.setattr(log, "_file", SlowFile(log._file))
            list(pool.map(lambda name: log.write(event(request=name)), names))
        assert sorted(line["request"] for line in lines(path)) == sorted(names)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot open the audit log .*absent.* make its folder"):
        AuditLog(tmp_path / "absent" / "audit.jsonl")


def test_a_closed_log_refuses(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.write(event())


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_raises() -> None:
    log = AuditLog(FULL)
    with pytest.raises(OSError, match="No space left"):
        log.write(event())
    with pytest.raises(OSError, match="No space left"):
        log.close()


@pytest.mark.parametrize("changes", [{"event": "opened"}, {"action": "block"}, {"zone": "red"}, {"prompt": "text"}])
def test_an_unknown_word_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        event(**changes)


def test_a_new_log_is_its_owners_alone_and_what_an_operator_has_set_stays(tmp_path: Path, open_umask: None) -> None:
    (tmp_path / "set").touch(mode=0o640)
    for name, mode in (("new", 0o600), ("set", 0o640)):
        with AuditLog(tmp_path / name) as log:
            log.write(event())
        assert (tmp_path / name).stat().st_mode & 0o777 == mode

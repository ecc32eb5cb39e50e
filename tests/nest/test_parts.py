"""Finished parts: kept, taken up again, and never taken for another measurement's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nest.parts import PartStore, key_of, read_results
from spider_sense.errors import ConfigError, DataError


def counted(calls: list[str], name: str) -> Callable[[], dict[str, Any]]:
    def compute() -> dict[str, Any]:
        calls.append(name)
        return {"value": len(calls)}

    return compute


def test_a_part_is_measured_once_and_again_under_another_key(tmp_path: Path) -> None:
    calls, path = list[str](), tmp_path / "results.json"
    assert PartStore(path).part("a", "key", counted(calls, "a"))["value"] == 1
    assert PartStore(path).part("a", "key", counted(calls, "a"))["value"] == 1
    assert PartStore(path).part("a", "other", counted(calls, "a"))["value"] == 2
    assert calls == ["a", "a"]


def test_a_run_that_stops_keeps_what_it_finished(tmp_path: Path) -> None:
    calls, path = list[str](), tmp_path / "new" / "results.json"
    store = PartStore(path)
    store.part("a", "key", counted(calls, "a"))

    def stop() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.part("b", "key", stop)
    document = json.loads(path.read_text())
    assert document["complete"] is False
    assert list(document["rows"]) == ["a"]
    again = PartStore(path)
    again.part("a", "key", counted(calls, "a"))
    again.part("b", "key", counted(calls, "b"))
    assert calls == ["a", "b"]


def test_a_result_holds_what_was_asked_for_in_this_run(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = PartStore(path)
    first.part("a", "key", dict)
    first.part("b", "key", dict)
    first.finish({"asr": 1})
    second = PartStore(path)
    second.part("b", "key", dict)
    result = second.finish({"asr": 2})
    assert result["complete"]
    assert result["asr"] == 2
    assert list(result["rows"]) == ["b"]
    assert json.loads(path.read_text()) == result
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_what_was_not_asked_for_is_kept_for_the_next_run(tmp_path: Path) -> None:
    calls, path = list[str](), tmp_path / "results.json"
    first = PartStore(path)
    for name in ("a", "b"):
        first.part(name, "key", counted(calls, name))
    first.finish({})
    for part in ("b", "b", "a"):
        again = PartStore(path)
        again.part(part, "key", counted(calls, part))
        assert list(again.finish({})["kept"]) == list(again.kept) == [{"a": "b", "b": "a"}[part]]
        assert again.replaced == []
    assert calls == ["a", "b"]
    other = PartStore(path)
    other.part("a", "other", counted(calls, "a"))
    assert other.replaced == ["a"]


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write into .*file/deep: .*file is a file; name another folder"):
        PartStore(tmp_path / "file" / "deep" / "results.json")


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = PartStore()
    store.part("a", "key", dict)
    assert store.finish({})["rows"]["a"]["seconds"] >= 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1, "rows": []}', '{"schema": 9, "complete": true, "rows": {}}']
)
def test_another_file_is_not_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(DataError, match="name another file"):
        PartStore(path)
    assert path.read_text() == text


def test_keys_tell_values_apart() -> None:
    assert key_of({"a": 1, "b": 2}, 3) == key_of({"b": 2, "a": 1}, 3)
    assert len({key_of(1), key_of("1"), key_of(1, None), key_of([1])}) == 4


def test_results_are_read_by_name_and_only_if_finished(tmp_path: Path) -> None:
    for name in ("base", "nest"):
        PartStore(tmp_path / f"{name}.json").finish({"asr": name})
    assert list(read_results([tmp_path / "nest.json", tmp_path / "base.json"])) == ["nest", "base"]
    PartStore(tmp_path / "half.json").part("a", "key", dict)
    with pytest.raises(DataError, match="unfinished"):
        read_results([tmp_path / "half.json"])
    with pytest.raises(DataError, match="does not exist"):
        read_results([tmp_path / "none.json"])
    with pytest.raises(DataError, match="two results are called 'base'"):
        read_results([tmp_path / "base.json", tmp_path / "base.json"])

"""What a served guard is told, and by whom."""

from pathlib import Path

import pytest

from spider_sense.errors import ConfigError
from spider_sense.serving.settings import find_settings


def test_nothing_is_guarded_unless_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIDER_SENSE_GUARD", raising=False)
    for nothing in ({}, None, {"other": 1}):
        assert find_settings(nothing) is None
    monkeypatch.setenv("SPIDER_SENSE_GUARD", "some/guard")
    found = find_settings({})
    assert found is not None
    assert found.guard == Path("some/guard")
    named = find_settings({"spider_sense": {"guard": "other/guard", "scores": True}})
    assert named is not None
    assert (named.guard, named.scores) == (Path("other/guard"), True)
    monkeypatch.setenv("SPIDER_SENSE_ENABLED", "0")
    assert find_settings({"spider_sense": {"guard": "other/guard"}}) is None


def test_a_wrong_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIDER_SENSE_ENABLED", raising=False)
    with pytest.raises(ConfigError, match="polcy"):
        find_settings({"spider_sense": {"guard": "g", "polcy": "p.yaml"}})

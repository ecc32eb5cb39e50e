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


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ({"principal_header": "Authorization"}, "Authorization carries a secret"),
        ({"principal_header": "X Principal"}, "principal_header: 'X Principal' is not allowed"),
        ({"exempt_principals": ["a", "unknown"]}, "'unknown' is everybody who does not say"),
        ({"exempt_principals": [""]}, "exempt_principals.0: '' is not allowed"),
    ],
)
def test_who_may_not_be_believed_or_exempt(told: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        find_settings({"spider_sense": {"guard": "g", **told}})
    found = find_settings({"spider_sense": {"guard": "g", "principal_header": "X-Who", "exempt_principals": ["a"]}})
    assert found is not None
    assert (found.principal_header, found.exempt_principals) == ("X-Who", ("a",))

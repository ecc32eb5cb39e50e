"""A throttled principal is let in at its pace and for its time; nobody else notices."""

import asyncio
import sys

import pytest

from spider_sense import policy
from spider_sense.errors import ConfigError, MissingExtraError
from spider_sense.serving.throttle import STORAGE, Throttle

RULE = policy.Throttle(requests=2, per_seconds=30, for_seconds=100)


def test_a_throttled_principal_waits_and_others_do_not() -> None:
    async def run() -> None:
        throttle = Throttle(RULE)
        assert [await throttle.wait("a") for _ in range(5)] == [0] * 5
        throttle.slow(["a"])
        assert [await throttle.wait("a") for _ in range(2)] == [0, 0]
        assert 29 <= await throttle.wait("a") <= 30
        assert [await throttle.wait("b") for _ in range(5)] == [0] * 5

    asyncio.run(run())


def test_it_ends_by_itself_and_begins_anew_with_each_offence() -> None:
    now = 0.0

    async def run() -> None:
        nonlocal now
        throttle = Throttle(RULE, lambda: now)
        throttle.slow(["a", "b"])
        for name in ("a", "b"):
            assert [await throttle.wait(name) for _ in range(2)] == [0, 0]
        now = 90.0
        throttle.slow(["b"])
        assert await throttle.wait("a") == 10, "it ends before the window does"
        now = 100.0
        assert await throttle.wait("a") == 0
        assert await throttle.wait("b") > 0
        throttle.slow([])
        assert list(throttle._until) == ["b"], "who is through with it is forgotten"

    asyncio.run(run())


def test_what_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORAGE, "memory://")
    with pytest.raises(ConfigError, match=f"{STORAGE}: MemoryStorage would hold up everybody"):
        Throttle(RULE)
    monkeypatch.setenv(STORAGE, "async+paper://")
    with pytest.raises(ConfigError, match=f"{STORAGE}: unknown storage scheme"):
        Throttle(RULE)
    monkeypatch.setitem(sys.modules, "limits", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[serve\]'"):
        Throttle(RULE)

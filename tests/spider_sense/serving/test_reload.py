"""The operator's endpoint: who may reload, what is asked for, and what comes of it."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense.errors import ConfigError, MismatchError, SpiderSenseError
from spider_sense.serving import reload
from spider_sense.serving.core_seams import reload_guard
from spider_sense.serving.reload import Reload, reload_key

SECRET = "0123456789abcdef"
BEARER = [(b"authorization", b"Bearer " + SECRET.encode())]
Ask = Callable[..., tuple[int, Any]]


@pytest.fixture
def asked() -> list[Any]:
    """What the engine was asked for."""
    return []


@pytest.fixture
def ask(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return a function that asks the endpoint: the parts of a body, and headers."""

    async def reload_guard(engine: Any, guard: Path, policy: Path | None, wait_seconds: float) -> Any:
        asked.append((engine, guard, policy, wait_seconds))
        if guard == Path("bad"):
            raise MismatchError("it does not fit. The engine goes on with the guard of before")
        return {"accepted": True}

    def run(*body: bytes, headers: Any = BEARER) -> tuple[int, Any]:
        parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
        parts[-1]["more_body"] = False
        sent: list[Any] = []

        async def receive() -> Any:
            return parts.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        endpoint = Reload(SECRET)
        endpoint.engine = "engine"
        asyncio.run(endpoint({"type": "http", "headers": headers}, receive, send))
        start, end = sent
        return start["status"], json.loads(end["body"])

    monkeypatch.setattr(reload, "reload_guard", reload_guard)
    return run


def test_the_operator_exchanges_a_guard(ask: Ask, asked: list[Any]) -> None:
    assert ask(b'{"guard": "ne', b'w"}') == (200, {"canaries": {"accepted": True}})
    assert ask(b'{"guard": "new", "policy": "p.yaml", "wait_seconds": 5}')[0] == 200
    assert asked == [("engine", Path("new"), None, 60.0), ("engine", Path("new"), Path("p.yaml"), 5.0)]
    status, said = ask(b'{"guard": "bad"}')
    assert status == 409
    assert said["error"].startswith("it does not fit")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer wrong")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Basic " + SECRET.encode())],
        [(b"authorization", SECRET.encode())],
        [(b"x-api-key", SECRET.encode())],
        [(b"authorization", b"Bearer wrong"), *BEARER],
    ],
)
def test_nobody_else_may(headers: list[tuple[bytes, bytes]], ask: Ask, asked: list[Any]) -> None:
    status, said = ask(b'{"guard": "new"}', headers=headers)
    assert status == 401
    assert SECRET not in said["error"]
    assert not asked


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", r"holds \[1\], not keys and values"),
        (b"{}", "guard"),
        (b'{"guard": "new", "polcy": "p"}', "policy"),
        (b'{"guard": "new", "wait_seconds": 0}', "wait_seconds"),
        (b'{"guard": "new", "wait_seconds": Infinity}', "wait_seconds"),
        (b'{"guard": "' + b"x" * (1 << 16) + b'"}', "at most 65536 bytes"),
    ],
)
def test_a_wrong_body_is_named(body: bytes, says: str, ask: Ask, asked: list[Any]) -> None:
    status, said = ask(body)
    assert status == 400
    assert re.search(says, said["error"])
    assert not asked


class Busy:
    """As much of an ``AsyncLLM`` as a reload touches, whose requests end after some seconds."""

    def __init__(self, seconds: float, cores: int = 1) -> None:
        self.seconds, self.engine_core = seconds, self
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=cores))
        self.did: list[str] = []

    async def is_paused(self) -> bool:
        return False

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("wait", True)
        await asyncio.sleep(self.seconds)
        self.did.append("paused")

    async def call_utility_async(self, name: str, *_: Any) -> Any:
        self.did.append(name)
        return {"canaries": None}

    async def resume_generation(self) -> None:
        self.did.append("resumed")


def test_nobody_is_kept_waiting_longer_than_the_operator_says() -> None:
    endless = Busy(3600)
    with pytest.raises(SpiderSenseError, match=r"requests still run: they did not end within 0\.01 seconds"):
        asyncio.run(reload_guard(endless, Path("new"), wait_seconds=0.01))
    assert endless.did == ["resumed"]
    short = Busy(0.01)
    asyncio.run(reload_guard(short, Path("new"), wait_seconds=60))
    assert short.did == ["paused", "spider_sense_reload", "resumed"]


def test_several_engines_are_not_asked_of_which_one_alone_would_answer() -> None:
    several = Busy(0.01, cores=2)
    with pytest.raises(ConfigError, match="in several data-parallel engines at once"):
        asyncio.run(reload_guard(several, Path("new")))
    assert several.did == []


def test_without_a_key_there_is_no_endpoint_and_a_short_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", SECRET):
        monkeypatch.setenv("SPIDER_SENSE_RELOAD_KEY", value)
        assert reload_key() == (value or None)
    monkeypatch.delenv("SPIDER_SENSE_RELOAD_KEY")
    assert reload_key() is None
    monkeypatch.setenv("SPIDER_SENSE_RELOAD_KEY", "hunter2")
    with pytest.raises(ConfigError, match="SPIDER_SENSE_RELOAD_KEY has 7 characters, which can be guessed") as error:
        reload_key()
    assert "hunter2" not in str(error.value)

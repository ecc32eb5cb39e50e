"""The operator's endpoint: who may reload, what is asked for, and what comes of it."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spider_sense.errors import ConfigError, MismatchError
from spider_sense.serving import reload
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

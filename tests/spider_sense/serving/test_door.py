"""The door of a server: every request goes on under its principal's name, or waits outside."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sense import policy
from spider_sense.errors import ConfigError
from spider_sense.policy import Policy, Rule
from spider_sense.serving.door import PRINCIPAL, Door, principals_of
from spider_sense.serving.principals import UNKNOWN, Principals
from spider_sense.serving.settings import ServingSettings
from spider_sense.serving.throttle import Throttle

PACE = policy.Throttle(requests=1, per_seconds=60, for_seconds=600)
THROTTLES = Policy(rules=(Rule(detector="*", zone="suspect", action="throttle"),))


class Server:
    """An application behind a door; it remembers whose requests it has got."""

    def __init__(self, throttle: Throttle | None) -> None:
        self.seen: list[str | None] = []
        self.state = SimpleNamespace(spider_sense_throttle=throttle)
        self.door = Door(self.answer, Principals("X-Principal", ()), past=("/reload",))

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(PRINCIPAL.get())
        await send({"type": "answered"})

    async def ask(self, *names: str, kind: str = "http", method: str = "POST", path: str = "/v1") -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("the door reads no body")

        headers = [(b"x-principal", name.encode()) for name in names]
        scope = {"type": kind, "headers": headers, "app": self, "path": path, "root_path": "/all"}
        scope |= {"method": method} if kind == "http" else {}
        await self.door(scope, receive, send)
        return sent


def test_a_request_goes_on_under_its_principals_name_and_that_of_no_other() -> None:
    async def run() -> None:
        server = Server(None)
        await asyncio.gather(server.ask("a"), server.ask("b"), server.ask(), server.ask("a", "b"))
        assert sorted(map(str, server.seen)) == ["a", "b", UNKNOWN, UNKNOWN]
        await server.ask("a")
        assert PRINCIPAL.get() is None
        await server.ask(kind="lifespan")
        assert server.seen[-1] is None

    asyncio.run(run())


def test_who_is_throttled_is_turned_away_in_the_form_that_clients_know() -> None:
    async def run() -> None:
        throttle = Throttle(PACE)
        server = Server(throttle)
        throttle.slow(["a"])
        assert await server.ask("a") == [{"type": "answered"}]
        start, body = await server.ask("a")
        assert start["status"] == 429
        headers = dict(start["headers"])
        assert 59 <= int(headers[b"retry-after"]) <= 60
        assert int(headers[b"content-length"]) == len(body["body"])
        error = json.loads(body["body"])["error"]
        assert error["code"] == "rate_limit_exceeded"
        assert error.keys() == {"message", "type", "param", "code"}
        assert headers[b"retry-after"].decode() in error["message"]
        assert server.seen == ["a"]
        # Others, and who asks no model for anything, come in.
        assert await server.ask("b") == await server.ask("a", method="GET") == [{"type": "answered"}]
        for path in ("/reload", "/all/reload"):
            assert await server.ask("a", path=path) == [{"type": "answered"}]
        (closed,) = await server.ask("a", kind="websocket")
        assert (closed["type"], closed["code"]) == ("websocket.close", 1013)

    asyncio.run(run())


@pytest.mark.parametrize("names", [(), ("",), ("a", "b")])
def test_all_who_do_not_say_who_they_are_are_throttled_together(names: Sequence[str]) -> None:
    async def run() -> None:
        throttle = Throttle(PACE)
        throttle.slow([UNKNOWN])
        server = Server(throttle)
        await server.ask()
        assert (await server.ask(*names))[0]["status"] == 429

    asyncio.run(run())


def test_a_server_that_tells_nobody_apart_cannot_throttle_or_exempt() -> None:
    plain = ServingSettings(guard=Path("g"))
    exempting = plain.model_copy(update={"exempt_principals": ("red-team",)})
    named = exempting.model_copy(update={"principal_header": "X-Principal"})
    assert principals_of(plain, Policy.default(), []) is None
    with pytest.raises(ConfigError, match=r"'throttle' need to know who.*--api-key.*principal_header"):
        principals_of(plain, THROTTLES, [])
    with pytest.raises(ConfigError, match="exempt_principals need to know who"):
        principals_of(exempting, Policy.default(), [])
    by_header = principals_of(named, THROTTLES, ["secret"])
    assert by_header is not None
    assert by_header.principal([(b"x-principal", b"red-team")]) == "red-team"
    with pytest.raises(ConfigError, match="'red-team' is none of 2bb80d537b1da3e3, the digests of the server's"):
        principals_of(exempting, THROTTLES, ["secret"])
    by_digest = plain.model_copy(update={"exempt_principals": ("2bb80d537b1da3e3",)})
    by_key = principals_of(by_digest, THROTTLES, ["secret"])
    assert by_key is not None
    assert by_key.principal([(b"x-principal", b"red-team")]) == UNKNOWN

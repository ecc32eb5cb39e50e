"""The operator's endpoint: another guard without a restart. It is there only if the operator gave it a key."""

import asyncio
import hashlib
import hmac
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat

from spider_sense.config import Settings, parse
from spider_sense.errors import ConfigError, SpiderSenseError
from spider_sense.serving.asgi import Message, Receive, Send, body_of, reply
from spider_sense.serving.reload_seams import WAIT, reload_guard

__all__ = ["PATH", "Reload", "reload_key"]

PATH = "/spider_sense/reload"
"""Not under ``/v1``: a key that lets clients ask the model is no key to its guard."""
KEY = "SPIDER_SENSE_RELOAD_KEY"
"""Environment variable, since vLLM logs its configuration."""
_SHORTEST = 16
_LONGEST_BODY = 1 << 16


class _Wanted(Settings):
    """What a request asks for, as JSON."""

    guard: Path
    """Folder of the new guard, on the server."""
    policy: Path | None = None
    """Its policy; by default the file of before, read anew."""
    wait_seconds: PositiveFloat = Field(default=WAIT, allow_inf_nan=False)
    """How long to wait for the requests that run to end; the others wait meanwhile."""


def reload_key(clients: Collection[str] = ()) -> str | None:
    """Return the key of the endpoint, None if there is to be none.

    Args:
        clients: API keys of the server.

    Raises:
        ConfigError: if it can be guessed, or clients have it.
    """
    key = os.environ.get(KEY)
    if key and len(key) < _SHORTEST:
        raise ConfigError(
            f"{KEY} has {len(key)} characters, which can be guessed; take at least {_SHORTEST}, as `openssl rand -hex "
            "16` prints them, or unset it"
        )
    if key in clients:
        raise ConfigError(
            f"{KEY} is one of the server's API keys, so every client that has it could exchange the guard; take "
            "another, as `openssl rand -hex 16` prints it, or unset it"
        )
    return key or None


class Reload:
    """ASGI application of the endpoint.

    Args:
        key: that the operator's requests bear.
    """

    def __init__(self, key: str) -> None:
        self._key = _digest(key.encode())
        self._one_at_a_time = asyncio.Lock()
        self.engine: Any = None
        """An ``AsyncLLM``, once it runs."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request: 200 and how far the canaries drift, 401, 400, or 409 where the guard of before stays."""
        if not self._may(scope):
            await reply(send, 401, {"error": f"send Authorization: Bearer and the value of {KEY}"})
            return
        try:
            wanted = _wanted(await body_of(receive, _LONGEST_BODY))
        except ConfigError as error:
            await reply(send, 400, {"error": str(error)})
            return
        try:
            async with self._one_at_a_time:
                canaries = await reload_guard(self.engine, wanted.guard, wanted.policy, wanted.wait_seconds)
        except SpiderSenseError as error:
            await reply(send, 409, {"error": str(error)})
            return
        await reply(send, 200, {"canaries": canaries})

    def _may(self, scope: Message) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return hmac.compare_digest(_digest(key.strip()), self._key) and scheme.lower() == b"bearer"


def _wanted(body: bytes | None) -> _Wanted:
    try:
        told = json.loads(body or b"")
    except ValueError as error:
        raise ConfigError(
            f"the body is not JSON ({error}) of at most {_LONGEST_BODY} bytes; send one such as "
            '{"guard": "FOLDER", "policy": "FILE"}'
        ) from error
    return parse(told, _Wanted, origin="the body")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

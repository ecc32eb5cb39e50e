"""vLLM's own check of API keys and the principal that a key names agree on every way to write the header."""

import asyncio
from typing import Any

import pytest

from spider_sense.serving.principals import UNKNOWN, Principals

pytestmark = [
    pytest.mark.vllm,
    # vLLM's own, when it is imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KEYS = ["secret", "other", "clé"]
NAME = b"authorization"


def let_in(headers: list[tuple[bytes, bytes]]) -> bool:
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    passed: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope)

    async def nothing(*_: Any) -> Any: ...

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(AuthenticationMiddleware(app, KEYS)(scope, nothing, nothing))
    return bool(passed)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ([b"Bearer secret"], "secret"),
        ([b"bearer other"], "other"),
        # Who is let in by one key must not pass for nobody by sending another, or the same again.
        ([b"Bearer secret", b"Bearer wrong"], "secret"),
        ([b"Bearer secret", b"Bearer secret"], "secret"),
        ([b"Bearer other", b"Bearer secret"], "other"),
        (["Bearer clé".encode("latin-1")], "clé"),
        ([b"Bearer wrong", b"Bearer secret"], None),
        ([b"Bearer"], None),
        ([b"Basic secret"], None),
        (["Bearer clé".encode()], None),
        ([], None),
    ],
)
def test_whoever_is_let_in_by_a_key_is_named_by_that_key(values: list[bytes], key: str | None) -> None:
    headers = [(NAME, value) for value in values]
    found = Principals(None, KEYS).principal(headers)
    assert let_in(headers) == (key is not None)
    assert found == (UNKNOWN if key is None else Principals(None, [key]).principal([(NAME, _bearer(key))]))


def _bearer(key: str) -> bytes:
    return f"Bearer {key}".encode("latin-1")

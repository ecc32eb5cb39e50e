"""As much of ASGI as is spoken here: the types of an application, and an answer in JSON."""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

__all__ = ["App", "Message", "Receive", "Send", "body_of", "path_of", "reply"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def path_of(scope: Message) -> str:
    """Return what a request asks for, without the path that the whole server lies under."""
    path: str = scope.get("path", "")
    return path.removeprefix(scope.get("root_path", ""))


async def body_of(receive: Receive, most: int) -> bytes | None:
    """Return the body of a request, None if it has more bytes than ``most`` or the client leaves before its end."""
    body: bytes = b""
    while True:
        part = await receive()
        body += part.get("body", b"")
        if part["type"] != "http.request" or len(body) > most:
            return None
        if not part.get("more_body", False):
            return body


async def reply(send: Send, status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
    """Answer a request.

    Args:
        send: of the request.
        status: the answer's.
        content: JSON-ready.
        headers: beside those that describe the body.
    """
    body = json.dumps(content).encode()
    named = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    lines = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})

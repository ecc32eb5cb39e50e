"""One request from its client to the engine and back: a name of the server's own, its case, and whether it is left."""

import asyncio
import threading
from collections.abc import Callable, Collection
from contextvars import ContextVar
from uuid import uuid4

from spider_sense.case import Case
from spider_sense.serving.asgi import App, Message, Receive, Send, path_of, reply
from spider_sense.serving.door import PRINCIPAL, READING

__all__ = ["ASK", "Ask", "Reception"]

ASK: ContextVar["Ask"] = ContextVar("spider_sense_ask")
"""The request that is being answered."""


class Ask:
    """A request to a model.

    Args:
        principal: who sends it; None where nothing tells.
    """

    def __init__(self, principal: str | None = None) -> None:
        self.name = uuid4().hex
        """The engine's id for it, whatever id its client gave it."""
        self.principal = principal
        self.case: Case | None = None
        """Set by the engine once it has generated all that it will."""
        self._left = threading.Event()
        self._cancels: list[Callable[[], object]] = []

    @property
    def left(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._left.is_set()

    def on_leave(self, cancel: Callable[[], object]) -> None:
        """Let something be called when the client leaves before the end of the answer, or now if it has."""
        self._cancels.append(cancel)
        if self.left:
            cancel()

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        self._left.set()
        for cancel in self._cancels:
            cancel()


class Reception:
    """ASGI middleware. It gives every request its ``ASK``, and ends those whose client leaves.

    Args:
        app: what answers.
        open_to: paths that are answered whatever the method; on any other only what reads.
    """

    def __init__(self, app: App, open_to: Collection[str]) -> None:
        self._app, self._open_to = app, open_to

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or say that its path is closed with the status 404."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or (scope["method"] not in READING and path_of(scope) not in self._open_to):
            await _refuse(scope, send, self._open_to)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        ask = Ask(PRINCIPAL.get())
        read, gone = asyncio.Event(), asyncio.Event()

        async def listen() -> Message:
            if read.is_set():
                await gone.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if not message.get("more_body", False):
                read.set()
            return message

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                watching.cancel()  # a connection that ends after the answer is left by nobody
            await send(message)

        async def watch() -> None:
            await read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            ask.leave()
            gone.set()
            answering.cancel()

        token = ASK.set(ask)
        try:
            answering = asyncio.ensure_future(self._app(scope, listen, tell))
            watching = asyncio.ensure_future(watch())
            await answering
        except asyncio.CancelledError:
            if not ask.left:
                ask.leave()
                raise
        finally:
            watching.cancel()
            ASK.reset(token)


async def _refuse(scope: Message, send: Send, open_to: Collection[str]) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": "no guard answers here"})
        return
    message = f"{path_of(scope)} is not served under a guard; what is: {', '.join(open_to)}"
    await reply(send, 404, {"error": {"message": message, "type": "requests", "param": None, "code": "not_found"}})

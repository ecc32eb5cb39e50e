"""Between a client of the Model Context Protocol and its tool server: calls and results pass only if they are screened.

async with stdio_client(server) as streams, ClientSession(*streams) as session:
    await session.initialize()
    tools = ScreenedSession(session, screen, messages)
    result = await tools.call_tool("read_mail", {"box": "inbox"})
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spider_sense.errors import MissingExtraError, RejectedError
from spider_sense.screening.history import Approve, History
from spider_sense.screening.message import Message
from spider_sense.screening.screen import NOTICE, Screen
from spider_sense.screening.verdict import Screening

__all__ = ["ScreenedSession"]


class ScreenedSession:
    """Stands in for an ``mcp.ClientSession`` where tools are called, in one conversation of an agent.

    A rejected call does not reach the server. A result is an observation: its text and its structured content are
    screened together, and if they are not accepted as they are, a notice is all that the client gets. Images, sounds
    and links cannot be screened and are left out. Nothing but tool calls passes: prompts and resources of a server are
    text by a stranger too.

    Args:
        session: an initialised session of ``mcp``.
        screen: decides.
        messages: the conversation so far, in OpenAI's format; calls and results are added to it.
        principal: whose agent it is.
        approve: asks a person about a call that needs one; without it such a call is rejected.

    Raises:
        MissingExtraError: if the package ``mcp`` is not installed.
    """

    def __init__(
        self,
        session: Any,
        screen: Screen,
        messages: list[dict[str, Any]],
        principal: str | None = None,
        approve: Approve | None = None,
    ) -> None:
        try:
            import anyio
            import mcp  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("mcp", "mcp") from error
        self._session, self._history, self.messages = session, History(screen, principal, approve), messages
        self._lock = anyio.Lock()

    @property
    def screenings(self) -> Sequence[Screening]:
        """All decisions so far, the newest last."""
        return self._history.screenings

    async def list_tools(self) -> Any:
        """Return what the server offers; its descriptions are not screened, so name only servers that you chose."""
        return await self._session.list_tools()

    async def call_tool(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Call a tool; calls of one conversation are made one after the other.

        Returns:
            The server's ``CallToolResult``; one with a notice alone where the call was not made or its result is not
            passed on, marked as an error if it was rejected.

        Raises:
            RejectedError: if what stands in ``messages`` before the call is rejected.
            ConfigError: if the conversation cannot be rendered.
            DataError: for a message that is not in OpenAI's chat format.
        """
        async with self._lock:
            return await self._called(name, arguments)

    async def _called(self, name: str, arguments: Mapping[str, Any] | None) -> Any:
        await self._take()
        place, number = len(self.messages), sum(message["role"] == "tool" for message in self.messages)
        written = json.dumps(dict(arguments or {}))
        call = {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": written}}
        self.messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        try:
            await self._take()
        except RejectedError:
            del self.messages[place:]
            return _notice(is_error=True)
        # What is sent is what was screened, whatever became of the caller's object meanwhile.
        result = await self._session.call_tool(name, json.loads(written))
        return await self._observed(result, call["id"])

    async def _observed(self, result: Any, call: Any) -> Any:
        from mcp.types import TextContent

        texts = [block for block in result.content if isinstance(block, TextContent)]
        found = result.structured_content
        structured = [] if found is None else [json.dumps(found, ensure_ascii=False)]
        content = "\n".join([*(block.text for block in texts), *structured])
        self.messages.append({"role": "tool", "tool_call_id": call, "content": content})
        rejected = False
        try:
            screened = (await self._take())[-1].content
        except RejectedError:
            screened, rejected = NOTICE, True
        if screened == content:
            return result.model_copy(update={"content": texts})
        self.messages[-1]["content"] = screened
        return _notice(is_error=rejected)

    async def _take(self) -> list[Message]:
        """Screen what is new, in a thread: it runs the model, and the loop serves others meanwhile."""
        import anyio.to_thread

        messages = [Message.parse(message, f"message {place}") for place, message in enumerate(self.messages)]
        return await anyio.to_thread.run_sync(self._history.take, messages)


def _notice(*, is_error: bool) -> Any:
    from mcp.types import CallToolResult, TextContent

    return CallToolResult(content=[TextContent(type="text", text=NOTICE)], is_error=is_error)

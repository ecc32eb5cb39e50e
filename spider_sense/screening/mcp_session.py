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

    A rejected call does not reach the server, nor does one of a tool that the server does not list. A result is an
    observation: its text and its structured content are screened together, and if they are not accepted as they are, a
    notice is all that the client gets. Images, sounds, links and what is said beside a result (``_meta``, annotations)
    are not screened and left out. Nothing but tool calls passes: prompts and resources of a server are text by a
    stranger too.

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
        self._offered: list[dict[str, Any]] = []

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
        await self._take()  # other servers' tools were perhaps called before: what was offered then is not known
        if name not in (tool["function"]["name"] for tool in self._offered):
            self._offered = await self._listed()
        place, number = len(self.messages), sum(message["role"] == "tool" for message in self.messages)
        written = json.dumps(dict(arguments or {}))
        call = {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": written}}
        self.messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        try:
            await self._take(self._offered)
        except RejectedError:
            del self.messages[place:]
            return _notice(is_error=True)
        # What is sent is what was screened, whatever became of the caller's object meanwhile.
        result = await self._session.call_tool(name, json.loads(written))
        return await self._observed(result, call["id"])

    async def _listed(self) -> list[dict[str, Any]]:
        """Return the schemas of all tools that the server lists now, page by page."""
        from mcp.types import PaginatedRequestParams

        found = await self._session.list_tools()
        tools = list(found.tools)
        while found.next_cursor is not None:
            found = await self._session.list_tools(params=PaginatedRequestParams(cursor=found.next_cursor))
            tools += found.tools
        return [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
            }
            for tool in tools
        ]

    async def _observed(self, result: Any, call: Any) -> Any:
        from mcp.types import CallToolResult, TextContent

        texts = [block.text for block in result.content if isinstance(block, TextContent)]
        found = result.structured_content
        structured = [] if found is None else [json.dumps(found, ensure_ascii=False)]
        content = "\n".join([*texts, *structured])
        self.messages.append({"role": "tool", "tool_call_id": call, "content": content})
        rejected = False
        try:
            screened = (await self._take(self._offered))[-1].content
        except RejectedError:
            screened, rejected = NOTICE, True
        if screened == content:
            blocks = [TextContent(type="text", text=text) for text in texts]
            return CallToolResult(content=[*blocks], structured_content=found, is_error=result.is_error)
        self.messages[-1]["content"] = screened
        return _notice(is_error=rejected)

    async def _take(self, offered: Sequence[Mapping[str, Any]] | None = None) -> list[Message]:
        """Screen what is new, in a thread: it runs the model, and the loop serves others meanwhile."""
        import anyio.to_thread

        messages = [Message.parse(message, f"message {place}") for place, message in enumerate(self.messages)]
        return await anyio.to_thread.run_sync(self._history.take, messages, offered)


def _notice(*, is_error: bool) -> Any:
    from mcp.types import CallToolResult, TextContent

    return CallToolResult(content=[TextContent(type="text", text=NOTICE)], is_error=is_error)

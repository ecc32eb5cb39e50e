"""A screened session of the Model Context Protocol, with a real tool server in a process of its own."""

import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from spider_sense.screening.cascade import Cascade
from spider_sense.screening.mcp_session import ScreenedSession
from spider_sense.screening.screen import NOTICE, Screen

pytest.importorskip("mcp")

SERVER = Path(__file__).with_name("mail_server.py")
ZONES = {"IGNORE": "breach", "9000": "breach", "RESTRICTED": "suspect"}
ASKED = [{"role": "user", "content": "What is new?"}]


@pytest.fixture
def screen(tools: Any) -> Screen:
    return Screen(tools.WordReader(), tools.WordSense(ZONES), Cascade())


def served(screen: Screen, log: Path, use: Callable[[ScreenedSession], Awaitable[None]]) -> ScreenedSession:
    """Start the server, use a screened session of it, and return the session."""
    import anyio
    from mcp import ClientSession, StdioServerParameters, stdio_client

    sessions: list[ScreenedSession] = []

    async def run() -> None:
        process = StdioServerParameters(command=sys.executable, args=[str(SERVER), str(log)])
        async with stdio_client(process) as streams, ClientSession(*streams) as session:
            await session.initialize()
            sessions.append(ScreenedSession(session, screen, [dict(message) for message in ASKED]))
            await use(sessions[0])

    anyio.run(run)
    return sessions[0]


class Lists:
    """A session that lists its tools, one on each page."""

    names = ("look", "pay")

    async def list_tools(self, *, params: Any = None) -> Any:
        from mcp.types import ListToolsResult, Tool

        place = int(params.cursor) if params is not None else 0
        more = str(place + 1) if place + 1 < len(self.names) else None
        return ListToolsResult(tools=[Tool(name=self.names[place], input_schema={})], next_cursor=more)


def texts(result: Any) -> Sequence[str]:
    return [block.text for block in result.content]


def test_what_is_clear_passes_as_it_is(screen: Screen, tmp_path: Path) -> None:
    async def use(session: ScreenedSession) -> None:
        assert {tool.name for tool in (await session.list_tools()).tools} == {"read_mail", "pay"}
        result = await session.call_tool("read_mail", {"box": "inbox"})
        assert texts(result) == ["From Dana: the plumber comes on Tuesday."]
        assert not result.is_error
        assert texts(await session.call_tool("pay", {"amount": 5})) == ["paid 5"]

    session = served(screen, tmp_path / "log", use)
    assert (tmp_path / "log").read_text() == "5\n"
    assert [message["role"] for message in session.messages] == ["user", *["assistant", "tool"] * 2]
    assert all(screening.outcome == "accept" for screening in session.screenings)


def test_an_injected_result_is_replaced(screen: Screen, tmp_path: Path) -> None:
    async def use(session: ScreenedSession) -> None:
        result = await session.call_tool("read_mail", {"box": "spam"})
        assert texts(result) == [NOTICE]
        assert result.structured_content is None
        # The conversation goes on, and what was removed is not looked at again.
        assert texts(await session.call_tool("read_mail", {"box": "inbox"}))[0].startswith("From Dana")

    session = served(screen, tmp_path / "log", use)
    assert not any("IGNORE" in message["content"] for message in session.messages)
    verdicts = [verdict for screening in session.screenings for verdict in screening.verdicts]
    assert [(verdict.artifact.span.message, verdict.outcome) for verdict in verdicts] == [
        (0, "accept"),
        (1, "accept"),
        (2, "sanitise"),
        (3, "accept"),
        (4, "accept"),
    ]


def test_a_suspect_result_without_a_judge_is_replaced(screen: Screen, tmp_path: Path) -> None:
    async def use(session: ScreenedSession) -> None:
        assert texts(await session.call_tool("read_mail", {"box": "odd"})) == [NOTICE]

    served(screen, tmp_path / "log", use)


def test_a_rejected_call_does_not_reach_the_server(screen: Screen, tmp_path: Path) -> None:
    async def use(session: ScreenedSession) -> None:
        result = await session.call_tool("pay", {"amount": 9000})
        assert result.is_error
        assert texts(result) == [NOTICE]
        assert session.messages == ASKED

    served(screen, tmp_path / "log", use)
    assert not (tmp_path / "log").exists()


def test_what_cannot_be_read_as_text_is_left_out(screen: Screen) -> None:
    import anyio
    from mcp.types import CallToolResult, ImageContent, TextContent

    class Session(Lists):
        async def call_tool(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
            image = ImageContent(type="image", data="aGk=", mime_type="image/png")
            return CallToolResult(content=[TextContent(type="text", text="a cat"), image])

    session = ScreenedSession(Session(), screen, [dict(message) for message in ASKED])
    assert texts(anyio.run(session.call_tool, "look", {})) == ["a cat"]


def test_structured_content_is_screened_too(screen: Screen) -> None:
    import anyio
    from mcp.types import CallToolResult, TextContent

    class Session(Lists):
        async def call_tool(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
            return CallToolResult(content=[TextContent(type="text", text="fine")], structured_content={"x": "IGNORE"})

    session = ScreenedSession(Session(), screen, [dict(message) for message in ASKED])
    result = anyio.run(session.call_tool, "look", {})
    assert texts(result) == [NOTICE]
    assert result.structured_content is None


def test_calls_at_once_are_made_one_after_the_other(screen: Screen) -> None:
    import anyio
    from mcp.types import CallToolResult, TextContent

    class Session(Lists):
        async def call_tool(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
            await anyio.sleep(0.02)
            return CallToolResult(content=[TextContent(type="text", text=f"paid {arguments['amount']}")])

    session = ScreenedSession(Session(), screen, [dict(message) for message in ASKED])
    results: dict[int, Any] = {}

    async def pay(amount: int) -> None:
        results[amount] = await session.call_tool("pay", {"amount": amount})

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for amount in (5, 9000, 6):
                group.start_soon(pay, amount)

    anyio.run(run)
    assert [texts(results[amount]) for amount in (5, 9000, 6)] == [["paid 5"], [NOTICE], ["paid 6"]]
    assert [message["role"] for message in session.messages] == ["user", *["assistant", "tool"] * 2]


def test_what_is_sent_is_what_was_screened(screen: Screen) -> None:
    import anyio
    from mcp.types import CallToolResult

    given, sent = {"amount": 5}, list[dict[str, Any]]()

    class Watching:
        """Screens, and has the caller's object changed as soon as its call was looked at."""

        def check(self, messages: Any, *args: Any, **fields: Any) -> Any:
            given["amount"] = 9000 if messages[-1].tool_calls else 5
            return screen.check(messages, *args, **fields)

        sanitised = staticmethod(Screen.sanitised)

    class Session(Lists):
        async def call_tool(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
            sent.append(arguments)
            return CallToolResult(content=[])

    watching: Any = Watching()
    anyio.run(ScreenedSession(Session(), watching, [dict(message) for message in ASKED]).call_tool, "pay", given)
    assert sent == [{"amount": 5}]


def test_a_tool_that_the_server_does_not_list_is_not_called(screen: Screen) -> None:
    import anyio
    from mcp.types import CallToolResult

    sent: list[str] = []

    class Session(Lists):
        async def call_tool(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
            sent.append(name)
            return CallToolResult(content=[])

    # What another server's tool was called for before is not this server's to know.
    before = {"id": "1", "type": "function", "function": {"name": "elsewhere", "arguments": "{}"}}
    asked: list[dict[str, Any]] = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [before]}]
    session = ScreenedSession(Session(), screen, [dict(message) for message in asked])
    assert anyio.run(session.call_tool, "format_disk", {}).is_error
    assert not anyio.run(session.call_tool, "pay", {}).is_error
    assert sent == ["pay"]


def test_what_is_said_beside_a_result_is_left_out(screen: Screen) -> None:
    import anyio
    from mcp.types import CallToolResult, TextContent

    class Session(Lists):
        async def call_tool(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
            blocks = [TextContent(type="text", text="fine", _meta={"note": "IGNORE"})]
            return CallToolResult(
                content=[*blocks], structured_content={"x": 1}, is_error=True, _meta={"note": "IGNORE"}
            )

    session = ScreenedSession(Session(), screen, [dict(message) for message in ASKED])
    result = anyio.run(session.call_tool, "look", {})
    assert (texts(result), result.structured_content, result.is_error) == (["fine"], {"x": 1}, True)
    assert "IGNORE" not in result.model_dump_json()

"""Tool calls put into the text of a turn, as the model writes them, where its chat template leaves them out.

SmolLM2's own template does. What such a server gives its model has no calls in it unless they stand in the text, so
this is for recorded conversations and for examples, not for a loop that the server itself renders.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.screening.message import Message, ToolCall
from spider_sense.screening.reader import ChatSpans
from spider_sense.screening.span import Conversation

__all__ = ["ReplayReader"]

_PROBE = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "tool_calls": [{"id": "call00000", "function": {"name": "b", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "call00000", "name": "b", "content": "c"},
)


class ReplayReader:
    """A span reader for conversations that were recorded.

    Args:
        spans: the model's own.
    """

    def __init__(self, spans: ChatSpans) -> None:
        self._spans = spans
        # A call that is opened by a control token cannot be written as text.
        self.writes = not spans.format.control and not _renders_calls(spans)
        """Whether calls are put into the text."""

    def read(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """Render and cut; see `spider_sense.screening.protocols.SpanReader`."""
        return self._spans.read([self._written(message) for message in messages] if self.writes else messages, tools)

    def _written(self, message: Message) -> Message:
        if not message.tool_calls:
            return message
        calls = [f'{{"name": {json.dumps(call.name)}, "arguments": {_arguments(call)}}}' for call in message.tool_calls]
        form = self._spans.format
        text = f"{message.content}{form.opens}[{', '.join(calls)}]{form.closes}"
        return message.model_copy(update={"content": text, "tool_calls": ()})


def _arguments(call: ToolCall) -> str:
    # What is no object could end the one around it and begin another; as a string it stays unreadable.
    written = call.function.arguments
    return json.dumps(written) if call.arguments is None else written


def _renders_calls(spans: ChatSpans) -> bool:
    try:
        spans.read([Message.parse(record) for record in _PROBE])
    except ConfigError:
        return False
    return True

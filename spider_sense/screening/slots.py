"""A conversation as a chat template takes it, once with its contents and once with marks in their place."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from spider_sense.screening.message import Message, ToolCall
from spider_sense.typed import mark

__all__ = ["Slot", "Slots"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One content: a message's text, or the name or the arguments of a call."""

    part: Literal["text", "name", "arguments"]
    message: int
    call: int | None
    forms: tuple[str, ...]
    """What a template may make of it, the likeliest first."""


@dataclass(slots=True)
class Slots:
    """The contents of a conversation.

    Arguments are given to the template as the object that they are, as servers do, and as their text where they are
    none.
    """

    slots: list[Slot] = field(default_factory=list)
    plain: list[dict[str, Any]] = field(default_factory=list)
    """Messages with their contents."""
    marked: list[dict[str, Any]] = field(default_factory=list)
    """Messages with marks."""

    @classmethod
    def of(cls, messages: Sequence[Message]) -> "Slots":
        """Take a conversation apart."""
        result = cls()
        for place, message in enumerate(messages):
            result._add(place, message)
        return result

    def _add(self, place: int, message: Message) -> None:
        plain: dict[str, Any] = {"role": message.role, "content": message.content}
        # Templates treat an empty text differently, and it has nothing to tell apart.
        text = message.content
        marked = plain | ({"content": self._slot("text", place, None, (text, text.strip()))} if text else {})
        extra = {key: getattr(message, key) for key in ("tool_call_id", "name") if getattr(message, key) is not None}
        if message.tool_calls:
            calls = [self._call(place, index, call) for index, call in enumerate(message.tool_calls)]
            plain["tool_calls"], marked["tool_calls"] = [one for one, _ in calls], [other for _, other in calls]
        self.plain.append(plain | extra)
        self.marked.append(marked | extra)

    def _call(self, place: int, index: int, call: ToolCall) -> tuple[dict[str, Any], dict[str, Any]]:
        arguments: Mapping[str, Any] | str | None = call.arguments
        name = self._slot("name", place, index, (call.name, _json(call.name)[1:-1]))
        if arguments is None:
            arguments = call.function.arguments
            value: Any = self._slot("arguments", place, index, (arguments, _json(arguments)[1:-1]))
        else:
            value = {self._slot("arguments", place, index, (_json(arguments),)): 0}
        shell = {"id": call.id, "type": "function"}
        return (
            shell | {"function": {"name": call.name, "arguments": arguments}},
            shell | {"function": {"name": name, "arguments": value}},
        )

    def _slot(
        self, part: Literal["text", "name", "arguments"], message: int, call: int | None, forms: tuple[str, ...]
    ) -> str:
        self.slots.append(Slot(part, message, call, forms))
        return mark(len(self.slots) - 1)


def _json(value: object) -> str:
    """Return JSON as the ``tojson`` of chat templates writes it."""
    return json.dumps(value, ensure_ascii=False)

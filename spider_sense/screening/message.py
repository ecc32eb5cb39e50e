"""Messages of a conversation, as OpenAI's chat format writes them."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spider_sense.errors import DataError

__all__ = ["Message", "ToolCall", "parse_object"]

Role = Literal["system", "developer", "user", "assistant", "tool"]


def _encodable(text: str) -> str:
    # Half a surrogate pair, which JSON can write and no tokenizer can read.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a character (a lone surrogate)") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class _Record(BaseModel):
    # Recorded messages carry much that is nobody's concern here: refusals, annotations, audio.
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Function(_Record):
    name: Text = Field(min_length=1)
    arguments: Text


class ToolCall(_Record):
    """One call that the model asks for."""

    id: Text = ""
    type: Literal["function"] = "function"
    function: _Function

    @property
    def name(self) -> str:
        """The tool."""
        return self.function.name

    @property
    def arguments(self) -> Mapping[str, Any] | None:
        """The arguments; None if they are not one JSON object with each key once."""
        return parse_object(self.function.arguments)


class Message(_Record):
    """One message."""

    role: Role
    content: Text = ""
    """Its text; the text parts of a message in parts stand one below the other."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: Text | None = None
    name: Text | None = None
    envelope: dict[str, Any] | None = None
    """What the sender's side vouched for, if another agent sent it."""

    @model_validator(mode="before")
    @classmethod
    def _no_old_call(cls, record: object) -> object:
        if isinstance(record, dict) and record.get("function_call") is not None:
            raise ValueError("holds function_call, the old form of a call, which nobody screens; use tool_calls")
        return record

    @field_validator("content", mode="before")
    @classmethod
    def _as_text(cls, content: object) -> object:
        if content is None:
            return ""
        if not isinstance(content, list):
            return content
        texts: list[Any] = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("holds parts that are not text, which cannot be screened; leave them out")
        return "\n".join(texts)

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _none_is_empty(cls, calls: object) -> object:
        return () if calls is None else calls

    @classmethod
    def parse(cls, record: object, where: str = "message") -> Self:
        """Read one message.

        Args:
            record: as it comes out of JSON.
            where: begins the error message.

        Raises:
            DataError: naming the field and its value's fault.
        """
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            fault = f"{path}: {first['msg']}" if path else first["msg"]
            raise DataError(f"{where}: {fault}; write it in OpenAI's chat format") from error

    def dump(self) -> dict[str, Any]:
        """Return the message for a chat template or an endpoint: what is known of it here, but for the envelope."""
        names = {key: getattr(self, key) for key in ("tool_call_id", "name") if getattr(self, key) is not None}
        calls = [call.model_dump(mode="json") for call in self.tool_calls]
        return {"role": self.role, "content": self.content} | ({"tool_calls": calls} if calls else {}) | names


def parse_object(text: str) -> dict[str, Any] | None:
    """Return what a text says; None if it is not one JSON object with each key once."""
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        _encodable(json.dumps(found, ensure_ascii=False))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers differ in which of two equal keys counts, so what was checked might not be what runs.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is written twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")

"""Logs of requests: JSON lines, one request a line.

    {"principal": "key-17", "time": 1767225600, "text": "..."}

``time`` is seconds since the epoch or an ISO 8601 date. In place of ``text`` stand ``messages``, a list of
``{"role", "content"}``, or activations: ``hidden``, or ``sketch`` and ``probes``. ``hidden`` is the mean over the
prompt's tokens of ``h / rms(h)``; a mean of ``h`` itself is another number, and refused where it is too large to be the
former. Optional: ``tenant``, ``family``, ``parameters``, ``links``, ``logit_bias`` (ids, or ids with their biases),
``top_logprobs``, ``max_tokens``, ``n``. Other fields, and those of these that are null, are passed over.

A line with ``hashed_ip`` and ``conversation`` is a conversation of WildChat; each of its user turns is a request.
"""

import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spider_sense.errors import DataError
from spider_sense.extraction.event import CHOICES, LATEST
from spider_sense.extraction.layout import LinkKind
from spider_sense.extraction.row_faults import ALLOWED, fault_in_words, unread_in_words

__all__ = ["Row", "read_rows", "streams_of"]


_Number = Annotated[float, Field(allow_inf_nan=False)]
LOUDEST = 1.01
"""Root mean square that ``hidden`` may have: a mean of vectors that have 1 each has no more, but for rounding."""


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(frozen=True)

    role: str
    content: str


class Row(BaseModel):
    """One request as a log tells it."""

    model_config = ConfigDict(frozen=True)

    principal: str = Field(min_length=1, coerce_numbers_to_str=True)
    time: float = Field(ge=0, lt=LATEST, allow_inf_nan=False)
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    hidden: tuple[_Number, ...] | None = None
    sketch: tuple[_Number, ...] | None = None
    probes: tuple[_Number, ...] | None = None
    tenant: str = Field(default="", max_length=24, pattern=r"^[ -~]*$")
    family: str = ""
    """What is fitted on: campaign family of an attacker's request, kind of work of an honest one."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    links: dict[LinkKind, str] = Field(default_factory=dict)
    logit_bias: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = ()
    top_logprobs: int = Field(default=0, ge=0, lt=2**31)
    max_tokens: int = Field(default=0, ge=0, lt=2**31)
    n: int = Field(default=1, ge=1, le=CHOICES)
    """Choices that were asked for."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, record: object) -> object:
        if not isinstance(record, Mapping):
            return record
        return {name: value for name, value in record.items() if value is not None or name in ("principal", "time")}

    @field_validator("time", mode="before")
    @classmethod
    def _date(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{value!r} is no date; give {ALLOWED['time']}") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _ids(cls, value: object) -> object:
        return tuple(value) if isinstance(value, Mapping) else value

    @field_validator("hidden")
    @classmethod
    def _is_normed(cls, hidden: tuple[float, ...] | None) -> tuple[float, ...] | None:
        rms = math.hypot(*hidden) / math.sqrt(len(hidden)) if hidden else 0.0
        if rms > LOUDEST:
            raise ValueError(
                f"its root mean square is {rms:.3g}, at most 1 is possible: give the mean over the prompt's tokens of "
                "h / rms(h), not of h"
            )
        return hidden

    @model_validator(mode="after")
    def _says_something(self) -> "Row":
        if self.text is None and not self.messages and self.hidden is None and self.sketch is None:
            raise ValueError("it has no text, messages, hidden or sketch; give one of them")
        if self.text is not None and self.messages:
            raise ValueError("it has a text and messages; give one of them")
        return self

    @property
    def words(self) -> str:
        """The user's last turn; empty if there is none."""
        if self.text is not None:
            return self.text
        return next((one.content for one in reversed(self.messages or ()) if one.role == "user"), "")

    @property
    def system(self) -> str:
        """The system prompt, without space around it; empty if there is none."""
        return next((one.content.strip() for one in self.messages or () if one.role == "system"), "")

    @property
    def prompt(self) -> str | tuple[tuple[str, str], ...] | None:
        """What the model is given: a text, or (role, content) pairs; None of a row that came without text."""
        return tuple((message.role, message.content) for message in self.messages) if self.messages else self.text


def read_rows(path: str | Path) -> list[Row]:
    """Read a log; empty lines are passed over.

    Raises:
        DataError: with the file and the line, if it cannot be used.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a file of JSON lines") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.extend(_rows(json.loads(line)))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path}, line {number}: {unread_in_words(line, error)}") from error
            except ValidationError as error:
                raise DataError(f"{path}, line {number}: {fault_in_words(error.errors()[0])}") from error
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no request; give one JSON object a line")
    return rows


def streams_of(rows: list[Row]) -> dict[str, list[Row]]:
    """Return each principal's requests in the order of time; those of one time stay in the order of the file."""
    streams: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.time):
        streams.setdefault(row.principal, []).append(row)
    return streams


def _rows(record: object) -> Iterator[Row]:
    if not isinstance(record, dict):
        raise ValueError(
            f'it holds {record!r:.60}, not an object; write {{"principal": ..., "time": ..., "text": ...}}'
        )
    if "hashed_ip" in record and "conversation" in record:
        yield from _wildchat(record)
    else:
        yield Row.model_validate(record)


def _wildchat(record: Mapping[str, Any]) -> Iterator[Row]:
    """Yield a request for every user turn of a conversation; the address is hashed already."""
    turns, header = record["conversation"], record.get("header") or {}
    if not isinstance(turns, list) or not isinstance(header, Mapping):
        raise ValueError("its conversation is no list, or its header no object; export WildChat's columns as they are")
    messages = [Message.model_validate(turn) for turn in turns]
    client = " ".join(str(header[name]) for name in sorted(header) if header[name])
    for index, message in enumerate(messages):
        if message.role == "user":
            said = turns[index].get("timestamp") or record.get("timestamp")
            if said is None:
                raise ValueError("the conversation has no timestamp; keep that column when exporting")
            yield Row.model_validate(
                {
                    "principal": record["hashed_ip"],
                    # pandas writes milliseconds.
                    "time": said / 1000 if isinstance(said, int | float) and said > LATEST else said,
                    "messages": messages[: index + 1],
                    "links": {"client": client} if client else {},
                }
            )

"""Tool calls in what a model writes, in the formats of four families.

Only the model's own turn is read: whatever looks like a call in a user's or a tool's text is text. What opens a call is
what the family's own server parser takes for one: a control token where there is one (a text that merely spells it
opens nothing), else the marker as the model was tuned to write it.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spider_sense.screening.message import parse_object

__all__ = ["FORMATS", "CallFormat", "Segment", "call_format"]

_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s,\[\]]*")


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a model's turn, in characters; what opens, parts and closes calls is in none."""

    start: int
    stop: int
    call: bool
    tool: str | None = None
    """Of a call; None if it cannot be read."""
    arguments: Mapping[str, Any] | None = None
    """Of a call; None if they cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """How a family of models writes calls."""

    name: str
    opens: str
    closes: str
    """Ends the calls; the end of the turn does so as well."""
    control: bool
    """Whether ``opens`` is a control token, which typed text can spell but not be."""
    bare: bool = False
    """Whether a turn that begins with a JSON object is a call too."""

    def segments(self, text: str, controls: Collection[int] = ()) -> Iterator[Segment]:
        """Cut a model's turn into text and calls.

        Args:
            text: the turn.
            controls: characters at which a token stands that is the control token ``opens``; in a turn that was sent
                as text there is none.
        """
        if self.bare and text.lstrip().startswith("{"):
            yield from _calls(text, 0, len(text))
            return
        place = 0
        while place < len(text):
            opened = self._next(text, place, controls)
            if text[place:opened].strip():
                yield Segment(place, opened, call=False)
            body = opened + len(self.opens)
            closed = text.find(self.closes, body)
            closed = len(text) if closed < 0 else closed
            yield from _calls(text, body, closed)
            place = max(closed + len(self.closes), body)

    def _next(self, text: str, place: int, controls: Collection[int]) -> int:
        """Return where calls are opened next; the end of the text if nowhere."""
        if self.control:
            return min((at for at in controls if at >= place), default=len(text))
        found = text.find(self.opens, place)
        return len(text) if found < 0 else found


FORMATS: Mapping[str, CallFormat] = {
    "llama3": CallFormat(name="llama3", opens="<|python_tag|>", closes="<|eom_id|>", control=True, bare=True),
    "mistral": CallFormat(name="mistral", opens="[TOOL_CALLS]", closes="</s>", control=True),
    "qwen2": CallFormat(name="qwen2", opens="<tool_call>", closes="</tool_call>", control=False),
    "smollm2": CallFormat(name="smollm2", opens="<tool_call>", closes="</tool_call>", control=False),
}


def call_format(tokenizer: Any) -> CallFormat:
    """Return the format of a tokenizer's family: that whose control token it has, else the marker in plain text."""
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return next((form for form in FORMATS.values() if form.opens in known), FORMATS["smollm2"])


def _calls(text: str, start: int, stop: int) -> Iterator[Segment]:
    """Read JSON objects one after the other, in a list or not; what cannot be read is one call that nobody can read."""
    place = _skip(text, start)
    while place < stop:
        try:
            _, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = stop
        yield _call(text, place, min(end, stop))
        place = _skip(text, end)


def _skip(text: str, place: int) -> int:
    match = _BETWEEN.match(text, place)
    return place if match is None else match.end()


def _call(text: str, start: int, stop: int) -> Segment:
    record = parse_object(text[start:stop]) or {}
    # With both, readers differ in which of them counts.
    given = [record[key] for key in ("arguments", "parameters") if key in record]
    name, arguments = record.get("name"), given[0] if len(given) == 1 else None
    tool = name if isinstance(name, str) else None
    return Segment(start, stop, True, tool, arguments if isinstance(arguments, dict) else None)

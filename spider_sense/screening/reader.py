"""Stages of a conversation, read from the server's own rendering of it."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.screening.message import Message
from spider_sense.screening.slots import Slot, Slots
from spider_sense.screening.span import Conversation, Span
from spider_sense.screening.stage import Stage
from spider_sense.screening.token_places import token_places
from spider_sense.screening.tool_calls import call_format
from spider_sense.typed import Piece, pieces, special_tokens

__all__ = ["ChatSpans"]

_STAGES: Mapping[str, Stage] = {"user": "query", "assistant": "plan", "tool": "observation"}
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{0,64}")
"""What a name or an id may be: templates write them, and no probe reads them by themselves."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A span by its place in the rendered text."""

    start: int
    stop: int
    span: Span
    hidden: str = ""
    """A text that the template left out at this place."""


class ChatSpans:
    """Renders conversations with a tokenizer's chat template and finds the stages in them.

    A boundary is where the template put one. A marker that a user, a tool or another agent wrote is text of their span:
    the places are found by rendering marks in place of all contents, and control tokens in contents are disabled. Calls
    that a model wrote as text are found in its own turns alone.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.

    Raises:
        ConfigError: if it has no template, or is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None) or not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r} needs a chat template and token offsets; "
                "use the fast tokenizer of an instruction-tuned model, or set tokenizer.chat_template"
            )
        self.tokenizer = tokenizer
        self.format = call_format(tokenizer)
        """How the model writes calls."""
        self._special = special_tokens(tokenizer)

    def read(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """Render a conversation and cut it into stages; see `spider_sense.screening.protocols.SpanReader`.

        Where the last message is not the assistant's, the template's opening of the answer ends the conversation. Text
        of an assistant that a template leaves out, as Llama's does beside a call, has an empty span before the call:
        the model does not see it, but whoever runs the loop does.

        Raises:
            ConfigError: if the template refuses the conversation, leaves out a call or a text of somebody else, or
                rewrites a content; if a name or an id is none.
        """
        slots = Slots.of(messages)
        self._check_names(messages)
        text = self._render(slots.plain, tools)
        try:
            cut = pieces(text, self._render(slots.marked, tools), [slot.forms for slot in slots.slots])
        except ValueError as error:
            raise ConfigError(
                f"the chat template rewrites a content, so the stages cannot be told apart: {error}; "
                "serve the model with a template that writes contents as they are"
            ) from error
        self._check_rendered(slots.slots, cut, messages)
        ids, place_of = self._tokenise(text, cut)
        found = sorted(self._found(cut, slots.slots, messages), key=lambda item: (item.start, item.stop))
        spans = _apart([_placed(place_of, item) for item in found])
        texts = tuple(item.hidden or text[item.start : item.stop] for item in found)
        return Conversation(ids=tuple(ids), spans=spans, texts=texts)

    def read_response(self, conversation: Conversation, response: Sequence[int]) -> Conversation:
        """Add what the model has generated after a conversation, its control tokens being what they are.

        Args:
            conversation: one that ends where the answer begins.
            response: the generated token ids so far, with or without the end of the turn.
        """
        body = list(takewhile(lambda token: token != self.tokenizer.eos_token_id, response))
        text = self._decode(body)
        places = token_places(body, text, self._decode)
        opener = self.tokenizer.convert_tokens_to_ids(self.format.opens)
        controls = [start for (start, _), token in zip(places, body, strict=True) if token == opener]
        spans, texts = list(conversation.spans), list(conversation.texts)
        for item in self._turn(text, 0, Span(stage="plan", start=0, stop=0, role="assistant"), controls):
            span, offset = _placed(places, item), len(conversation.ids)
            spans.append(replace(span, start=offset + span.start, stop=offset + span.stop))
            texts.append(text[item.start : item.stop])
        return Conversation(ids=(*conversation.ids, *response), spans=_apart(spans), texts=tuple(texts))

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        from jinja2 import TemplateError

        open_end = not messages or messages[-1]["role"] != "assistant"
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, add_generation_prompt=open_end, tokenize=False
            )
        except (TemplateError, TypeError) as error:
            raise ConfigError(
                f"the chat template cannot render this conversation: {error}; send what the model's server would take"
            ) from error
        return text

    def _check_names(self, messages: Sequence[Message]) -> None:
        """Refuse what is no name where a template writes one: control tokens could not be disabled there."""
        for place, message in enumerate(messages):
            names = [message.tool_call_id or "", message.name or "", *(call.id for call in message.tool_calls)]
            bad = next((token for token in self._special for name in names if token in name), None)
            if bad is not None:
                raise ConfigError(f"message {place} has the control token {bad!r} in a name or an id; rename it")
            odd = next((name for name in names if not _NAME.fullmatch(name)), None)
            if odd is not None:
                raise ConfigError(
                    f"message {place} has {odd[:64]!r} for a name or an id, which nobody screens; "
                    "use at most 64 letters, digits and _ . : / -"
                )

    def _check_rendered(self, slots: Sequence[Slot], cut: Sequence[Piece], messages: Sequence[Message]) -> None:
        seen = {index for _, index in cut}
        for index, slot in enumerate(slots):
            if index in seen or (slot.part == "text" and messages[slot.message].role == "assistant"):
                continue
            what = "text" if slot.part == "text" else "tool calls"
            raise ConfigError(
                f"the chat template leaves out the {what} of message {slot.message}, so the model would not see them; "
                "serve it with a template that renders them, such as configs/smollm2-tools.jinja"
            )

    def _tokenise(self, text: str, cut: Sequence[Piece]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids, and the characters of the rendered text that each stands for."""
        if not any(token in piece for piece, index in cut if index is not None for token in self._special):
            return self._encode(text, False)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        start = 0
        for piece, index in cut:
            more, offsets = self._encode(piece, index is not None)
            ids += more
            places += [(start + first, start + last) for first, last in offsets]
            start += len(piece)
        return ids, places

    def _encode(self, text: str, typed: bool) -> tuple[list[int], list[tuple[int, int]]]:
        coded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=typed, return_offsets_mapping=True)
        return list(coded["input_ids"]), list(coded["offset_mapping"])

    def _found(self, cut: Sequence[Piece], slots: Sequence[Slot], messages: Sequence[Message]) -> Iterator[_Found]:
        calls: dict[tuple[int, int], list[int]] = {}
        roles = _roles(messages)
        start = 0
        for piece, index in cut:
            stop = start + len(piece)
            if index is not None:
                slot = slots[index]
                if slot.call is not None:
                    calls.setdefault((slot.message, slot.call), []).extend((start, stop))
                elif slot.message in roles:
                    yield from self._text_spans(piece, start, roles[slot.message])
            start = stop
        yield from _left_out(cut, slots, messages, roles)
        for (place, number), ends in calls.items():
            call = messages[place].tool_calls[number]
            # Arguments that are no JSON object were written as they came; a span knows them as unreadable.
            base = Span(stage="action", start=0, stop=0, role="assistant", message=place, call=number)
            yield _Found(min(ends), max(ends), replace(base, tool=call.name, arguments=call.arguments))

    def _text_spans(self, text: str, start: int, span: Span) -> Iterator[_Found]:
        if span.stage == "plan":
            yield from self._turn(text, start, span)
        elif text.strip():
            yield _Found(start, start + len(text), span)

    def _turn(self, text: str, start: int, span: Span, controls: Collection[int] = ()) -> Iterator[_Found]:
        """Cut a model's turn into what it thinks and what it calls."""
        number = 0
        for part in self.format.segments(text, controls):
            kind = span
            if part.call:
                kind = replace(span, stage="action", call=number, tool=part.tool, arguments=part.arguments)
                number += 1
            yield _Found(start + part.start, start + part.stop, kind)


def _left_out(
    cut: Sequence[Piece], slots: Sequence[Slot], messages: Sequence[Message], roles: Mapping[int, Span]
) -> Iterator[_Found]:
    """Return the texts that the template left out, each where the next content begins."""
    starts: dict[int, int] = {}
    end = 0
    for piece, index in cut:
        if index is not None:
            starts.setdefault(index, end)
        end += len(piece)
    for index, slot in enumerate(slots):
        text = messages[slot.message].content
        if slot.part == "text" and index not in starts and text.strip():
            place = next((starts[other] for other in range(index + 1, len(slots)) if other in starts), end)
            yield _Found(place, place, roles[slot.message], hidden=text)


def _roles(messages: Sequence[Message]) -> dict[int, Span]:
    """Return an empty span of the right stage for each message that has one."""
    names: dict[str, str] = {}
    result: dict[int, Span] = {}
    for place, message in enumerate(messages):
        names |= {call.id: call.name for call in message.tool_calls}
        # What another agent sent is read, not asked, whatever role its message was given.
        stage = "observation" if message.envelope is not None else _STAGES.get(message.role)
        if stage is not None:
            tool = names.get(message.tool_call_id or "", message.name) if message.role == "tool" else None
            result[place] = Span(stage=stage, start=0, stop=0, role=message.role, message=place, tool=tool)
    return result


def _placed(places: Sequence[tuple[int, int]], item: _Found) -> Span:
    """Return a span from the first token that has a character of it to the last one; an empty one of no characters."""
    if item.start == item.stop:
        place = sum(last <= item.start for _, last in places)
        return replace(item.span, start=place, stop=place)
    inside = [index for index, (first, last) in enumerate(places) if first < item.stop and last > item.start]
    return replace(item.span, start=inside[0], stop=inside[-1] + 1)


def _apart(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Give a token that two spans share to the first of them."""
    result: list[Span] = []
    for span in spans:
        start = max(span.start, result[-1].stop if result else 0)
        result.append(replace(span, start=start, stop=max(start, span.stop)))
    return tuple(result)

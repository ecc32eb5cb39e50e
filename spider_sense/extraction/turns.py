"""The turns of a prompt, told by the template's own tokens: what a user typed can look like none of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from jinja2 import TemplateError

from spider_sense.chat import Chat

__all__ = ["Parts", "Turns"]


@dataclass(frozen=True, slots=True)
class Parts:
    """What of a prompt the detector hashes; none of it is kept."""

    prefix: str
    """The system prompt, where it is not the template's own; else all that stands before the first user's turn."""
    text: str
    """The last user's turn."""


class Turns:
    """Takes prompts apart; safe for several threads.

    Args:
        tokenizer: the server's.
        today: tells the day by the clock that templates write dates from.

    Raises:
        ConfigError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, today: Callable[[], date] = date.today) -> None:
        self._tokenizer, self._today = tokenizer, today
        self._template = _Template(tokenizer, today())

    def parts(self, prompt: Sequence[int]) -> Parts:
        """Return the parts of a prompt; one that the template did not render is a single turn."""
        today, template = self._today(), self._template
        if template.day != today:
            # Some templates write the date into every prompt.
            self._template = template = _Template(self._tokenizer, today)
        return template.parts(list(prompt))


class _Template:
    """What a template writes around the turns on one day."""

    def __init__(self, tokenizer: Any, day: date) -> None:
        self.day, self._decode = day, tokenizer.decode
        chat = Chat(tokenizer)
        self._head, self._tail = list(chat.head), chat.tail
        ask = chat.render([("user", "Alpha"), ("assistant", "Zulu"), ("user", "Alpha")]).ids
        before = ask[: len(ask) - self._tail - len(tokenizer("Alpha", add_special_tokens=False)["input_ids"])]
        self._header = list(_common_end(before, chat.head))
        self._frame = self._system_frame(chat)

    def parts(self, tokens: list[int]) -> Parts:
        starts = self._starts(tokens)
        if not starts:
            return Parts("", self._decode(tokens, skip_special_tokens=True))
        first, last = starts[0], starts[-1]
        prefix = "" if tokens[:first] == self._head else self._prefix(tokens[:first])
        text = self._decode(tokens[last : len(tokens) - self._tail], skip_special_tokens=True)
        return Parts(prefix, text)

    def _prefix(self, tokens: list[int]) -> str:
        """Return what a client put before the first user's turn, without what the template writes around it."""
        head, tail = self._frame
        if len(tokens) >= len(head) + len(tail) and tokens[: len(head)] == head and _ends(tokens, tail):
            tokens = tokens[len(head) : len(tokens) - len(tail)]
        text: str = self._decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _system_frame(self, chat: Chat) -> tuple[list[int], list[int]]:
        """Return the tokens that the template writes before and behind a system prompt; none if it takes none."""
        try:
            asked = [chat.render([("system", said), ("user", "Alpha")]).ids for said in ("Alpha one", "Zulu, two")]
        except TemplateError:
            return [], []
        if not all(self._starts(list(ids)) for ids in asked):
            return [], []
        one, other = (list(ids[: self._starts(list(ids))[0]]) for ids in asked)
        return list(_common_end(one[::-1], other[::-1]))[::-1], list(_common_end(one, other))

    def _starts(self, tokens: list[int]) -> list[int]:
        """Return where the contents of user turns begin."""
        header, size = self._header, len(self._header)
        return [
            place + size
            for place in range(len(tokens) - size + 1)
            if size and tokens[place] == header[0] and tokens[place : place + size] == header
        ]


def _ends(tokens: list[int], tail: list[int]) -> bool:
    return tokens[len(tokens) - len(tail) :] == tail


def _common_end(one: Sequence[int], other: Sequence[int]) -> Sequence[int]:
    size = 0
    while size < min(len(one), len(other)) and one[-1 - size] == other[-1 - size]:
        size += 1
    return one[len(one) - size :]

"""Conversations as the server renders them: token ids, and which of them the template wrote.

The scored text is the chat-templated conversation. Special tokens that a user types are text, not control tokens, so a
prompt cannot close its own turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spider_sense.errors import ConfigError
from spider_sense.typed import mark, pieces, special_tokens

__all__ = ["Chat", "Rendered", "Turn", "unscored"]

Turn = tuple[str, str]
"""(role, content)."""

_CONTENTS = ("Alpha one", "Zulu, two")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt that is ready to be generated from."""

    ids: tuple[int, ...]
    skip: int
    """Leading tokens that are not scored."""
    tail: int
    """Last tokens, written by the template after the user's turn."""


class Chat:
    """A tokenizer's chat template, taken apart once.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.

    Raises:
        ConfigError: if it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template; "
                "use an instruction-tuned model, or set tokenizer.chat_template"
            )
        self.tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        samples = [self._ids([("user", content)]) for content in _CONTENTS]
        self.head: tuple[int, ...] = tuple(samples[0][: _common_length(*samples)])
        """Tokens that open every conversation: system prompt and the user header."""
        self.tail = _common_length(*(sample[::-1] for sample in samples))
        """Tokens that close every prompt: the end of the user's turn and the assistant header."""

    def render(self, turns: Sequence[Turn] | str, max_tokens: int | None = None) -> Rendered:
        """Render a conversation up to the point where the model answers.

        Args:
            turns: (role, content) pairs, or the text of a single user turn.
            max_tokens: if given, tokens are cut from the middle of a longer prompt.
        """
        ids = tuple(self._ids([("user", turns)] if isinstance(turns, str) else turns))
        return self.cut(Rendered(ids, unscored(self.head, ids), self.tail), max_tokens)

    def cut(self, prompt: Rendered, max_tokens: int | None) -> Rendered:
        """Return a prompt with what is too long taken from its middle; None cuts nothing."""
        if max_tokens is None or len(prompt.ids) <= max_tokens:
            return prompt
        half = max_tokens // 2
        ids = prompt.ids[:half] + prompt.ids[half - max_tokens :]
        return Rendered(ids, unscored(self.head, ids), self.tail)

    def _ids(self, turns: Sequence[Turn]) -> list[int]:
        text = self._text(turns)
        if not any(token in content for token in self._special for _, content in turns):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids: list[int] = []
        frame = self._text([(role, mark(index)) for index, (role, _) in enumerate(turns)])
        try:
            # A template may trim what it is given.
            cut = pieces(text, frame, [(content, content.strip()) for _, content in turns])
        except ValueError as error:
            raise ConfigError(
                "the chat template rewrites message content, so special tokens in it cannot be kept apart; "
                f"remove them from the text: {', '.join(self._special)}"
            ) from error
        for piece, typed in cut:
            split = typed is not None
            ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        return ids

    def _text(self, turns: Sequence[Turn]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text


def unscored(head: tuple[int, ...], ids: Sequence[int]) -> int:
    """Return how many leading tokens of a prompt are not scored.

    That is the template's head where the prompt opens with it token for token, else the first token alone, whose
    activations are an attention sink of hundreds of times the usual size.
    """
    return len(head) if tuple(ids[: len(head)]) == head else 1


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many leading tokens two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

"""Conversations as the server renders them: token ids, and which of them the template wrote.

The scored text is the chat-templated conversation. Special tokens that a user types are text, not control tokens, so a
prompt cannot close its own turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from spider_sense.errors import ConfigError

__all__ = ["Chat", "Rendered", "Turn"]

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
        samples = [self._ids([("user", content)]) for content in _CONTENTS]
        self.head: tuple[int, ...] = tuple(commonprefix(samples))
        """Tokens that open every conversation: system prompt and the user header."""
        self.tail = len(commonprefix([sample[::-1] for sample in samples]))
        """Tokens that close every prompt: the end of the user's turn and the assistant header."""

    def render(self, turns: Sequence[Turn] | str, max_tokens: int | None = None) -> Rendered:
        """Render a conversation up to the point where the model answers.

        Args:
            turns: (role, content) pairs, or the text of a single user turn.
            max_tokens: if given, tokens are cut from the middle of a longer prompt.
        """
        ids = self._ids([("user", turns)] if isinstance(turns, str) else turns)
        if max_tokens is not None and len(ids) > max_tokens:
            half = max_tokens // 2
            ids = ids[:half] + ids[half - max_tokens :]
        return Rendered(tuple(ids), self.skip(ids), self.tail)

    def skip(self, ids: Sequence[int]) -> int:
        """Return how many leading tokens of a prompt are not scored.

        That is the template's head where the prompt opens with it token for token, else the first token alone, whose
        activations are an attention sink of hundreds of times the usual size.
        """
        return len(self.head) if tuple(ids[: len(self.head)]) == self.head else 1

    def _ids(self, turns: Sequence[Turn]) -> list[int]:
        messages = [{"role": role, "content": content} for role, content in turns]
        text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        special = [token for token in self.tokenizer.all_special_tokens if any(token in turn[1] for turn in turns)]
        if not special:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._ids_with_literal_content(text, turns)

    def _ids_with_literal_content(self, text: str, turns: Sequence[Turn]) -> list[int]:
        """Tokenise the template's own text with special tokens and each content without."""
        ids: list[int] = []
        for _, content in turns:
            # A template may trim what it is given.
            content = content if content in text else content.strip()
            before, found, text = text.partition(content)
            if not found:
                raise ConfigError(
                    "the chat template rewrites message content, so special tokens in it cannot be kept apart; "
                    f"remove {self.tokenizer.all_special_tokens} from the text"
                )
            ids += self.tokenizer(before, add_special_tokens=False)["input_ids"]
            ids += self.tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids + list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

"""What a chat template wrote, and what was typed into it.

The places come from rendering marks instead of contents: searching for a content could find the same words in the
template, such as the very token it must not be taken for.
"""

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["Piece", "mark", "pieces", "special_tokens"]

Piece = tuple[str, int | None]
"""A stretch of a rendered text, and the index of the content that it is; None if the template wrote it."""

# Unicode reserves these characters for marks that no text holds. A mark that stands for an object is a key of one.
_MARK = re.compile('(?:\\{"\ufdd0(\\d+)\ufdd1": 0\\}|\ufdd0(\\d+)\ufdd1)')


def mark(index: int) -> str:
    """Return the text that stands for a content; as the only key of an object, with value 0, it stands for that."""
    return f"\ufdd0{index}\ufdd1"


def pieces(text: str, frame: str, contents: Sequence[Sequence[str]]) -> list[Piece]:
    """Split a rendered text into what the template wrote and what was typed.

    Args:
        text: the conversation, rendered.
        frame: the same with marks in place of contents.
        contents: what each mark stands for, in the forms that a template may give it, the likeliest first.

    Raises:
        ValueError: if the template did something else to a content.
    """
    parts = [part for part in _MARK.split(frame) if part is not None]
    result: list[Piece] = []
    for place, part in enumerate(parts):
        index = int(part) if place % 2 else None
        forms = (part,) if index is None else contents[index]
        after = "" if index is None else parts[place + 1]
        found = next((form for form in forms if text.startswith(form + after)), None)
        if found is None:
            raise ValueError(f"the template wrote {text[:40]!r} where something else was expected")
        result.append((found, index))
        text = text[len(found) :]
    if text:
        raise ValueError(f"the template wrote {text[:40]!r} after the end")
    return result


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the control tokens of a tokenizer."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    # Some tokenizers name few of their control tokens among all_special_tokens.
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))

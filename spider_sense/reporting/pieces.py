"""Tokens as text that can be shown one by one."""

from collections.abc import Sequence
from typing import Any

__all__ = ["pieces"]

_LONGEST = 4
"""Most tokens that one character is spread over."""


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; the bytes of a character that spans several tokens are shown at the last."""
    result: list[str] = []
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith("\ufffd") and len(held) < _LONGEST:
            result.append("")
            continue
        # Decoding a token on its own drops the space that SentencePiece writes as this mark.
        spaced = str(tokenizer.convert_ids_to_tokens(held[0])).startswith("\u2581") and not text.startswith(" ")
        result.append(f" {text}" if spaced else text)
        held = []
    return result

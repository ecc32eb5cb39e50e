"""Text from outside, so that it can be shown."""

import unicodedata

__all__ = ["printable"]


def printable(text: str) -> str:
    """Make control and formatting characters visible: they could reorder or hide the text around them."""
    return "".join(
        f"[U+{ord(char):04X}]" if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co") else char
        for char in text
    )

"""Text from outside, for the terminal."""

from rich.text import Text

from spider_sense.printable import printable

__all__ = ["plain"]


def plain(text: str, style: str = "") -> Text:
    """Return text that came from outside: brackets are no markup in it, and it holds no control characters.

    A prompt, an answer, a file's name or a guard's manifest could otherwise rewrite what the terminal shows.
    """
    return Text(printable(text.expandtabs(4)), style=style)

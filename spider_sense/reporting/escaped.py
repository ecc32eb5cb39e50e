"""Text from outside, for a page."""

import html

from spider_sense.printable import printable

__all__ = ["escaped"]


def escaped(text: str) -> str:
    """Return text that came from outside as HTML: it brings no marks and hides no characters."""
    return html.escape(printable(text))

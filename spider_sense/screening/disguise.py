"""The forms in which a secret is looked for: as it is, and as simple encodings of it."""

import base64
import codecs
import html
import re
import unicodedata
from collections.abc import Callable, Iterator
from urllib.parse import unquote

__all__ = ["disguises", "folded", "unescaped"]

_LOOKS = str.maketrans("авекмнорстухіјѕһԁԛԝαβεηικνορτυχ", "abekmhopctyxijshdqwabehikvoptux")
"""Cyrillic and Greek letters that are drawn like Latin ones, in either case."""
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|u\{0*([0-9a-f]{1,6})\})", re.IGNORECASE)
_ENCODINGS: tuple[tuple[str, Callable[[bytes], bytes], int, int], ...] = (
    ("in base64", base64.b64encode, 6, 3),
    ("in base32", base64.b32encode, 5, 5),
)
"""Name, encoder, bits of a letter, bytes after which it starts anew."""


def folded(text: str) -> str:
    """Return the letters and digits of a text alone, without case, accents and foreign look-alikes, so that spacing,
    punctuation and dress hide nothing."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(filter(str.isalnum, plain)).translate(_LOOKS)


def unescaped(text: str) -> str:
    """Return a text with the escapes of JSON, Python, HTML and addresses as the letters that they stand for."""
    return html.unescape(unquote(_ESCAPE.sub(_letter, text)))


def disguises(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, folded form) of a text and of what it becomes when it is reversed or encoded."""
    data = text.encode("utf-8", "replace")
    yield "as it is", folded(text)
    yield "reversed", folded(text[::-1])
    yield "in rot13", folded(codecs.encode(text, "rot13"))
    yield "in hexadecimal", data.hex()
    for name, encode, bits, period in _ENCODINGS:
        # A byte looks different at each place of the period; letters at the ends hold bits of what stands around.
        for before in range(period):
            encoded = encode(b"\0" * before + data).decode()
            yield name, folded(encoded[-(-before * 8 // bits) : (before + len(data)) * 8 // bits])


def _letter(escape: re.Match[str]) -> str:
    code = int(next(filter(None, escape.groups())), 16)
    return chr(code) if code <= 0x10FFFF else ""

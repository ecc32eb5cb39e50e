"""The forms in which a secret is looked for: as it is, and as simple encodings of it."""

import base64
import codecs
import unicodedata
from collections.abc import Iterator

__all__ = ["disguises", "folded"]


def folded(text: str) -> str:
    """Return the letters and digits of a text alone, without case, so that spacing and punctuation hide nothing."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def disguises(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, folded form) of a text and of what it becomes when it is reversed or encoded."""
    data = text.encode("utf-8", "replace")
    yield "as it is", folded(text)
    yield "reversed", folded(text[::-1])
    yield "in rot13", folded(codecs.encode(text, "rot13"))
    yield "in hexadecimal", data.hex()
    for before in range(3):
        # In base64 a byte looks different at each of three places, and the ends depend on what stands around.
        encoded = base64.b64encode(b"\0" * before + data).decode()
        yield "in base64", folded(encoded[4 if before else 0 : -4])

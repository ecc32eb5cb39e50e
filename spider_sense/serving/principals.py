"""Who sends a request: the value of a header that the operator's proxy sets, or a digest of the API key."""

import hashlib
from collections.abc import Iterable, Sequence

from spider_sense.errors import ConfigError
from spider_sense.types import UNKNOWN

__all__ = ["UNKNOWN", "Principals"]


class Principals:
    """Tells principals apart by the headers of their requests.

    Args:
        header: the one that names them; None for the API key.
        keys: the server's API keys.
    """

    def __init__(self, header: str | None, keys: Sequence[str]) -> None:
        self._header = (header or "authorization").lower().encode()
        self._by_key = header is None
        self._known = {_digest(key) for key in keys}

    def principal(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return who sends a request, ``UNKNOWN`` if it does not tell.

        A proxy that adds its header to the client's tells nothing. Of several keys vLLM takes the first, and so does
        this: whoever is let in by one must not pass for nobody by sending another.

        Args:
            headers: names in lower case, and values.
        """
        values = [value.decode("latin-1").strip() for name, value in headers if name.lower() == self._header]
        if self._by_key:
            return self._holder(values[0]) if values else UNKNOWN
        return values[0] if len(values) == 1 and values[0] else UNKNOWN

    def check_known(self, principals: Iterable[str]) -> None:
        """Check that some principals can send requests at all.

        Raises:
            ConfigError: if keys tell principals apart, and one of these holds none.
        """
        for name in principals:
            if self._by_key and name not in self._known:
                raise ConfigError(
                    f"exempt_principals: {name!r} is none of {', '.join(sorted(self._known))}, the digests of the "
                    "server's API keys; name one of them, or set principal_header"
                )

    def _holder(self, value: str) -> str:
        scheme, _, key = value.partition(" ")
        digest = _digest(key)
        # Some paths are open to clients without a key, who may send any.
        return digest if scheme.lower() == "bearer" and digest in self._known else UNKNOWN


def _digest(key: str) -> str:
    """Return what stands for an API key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]

"""Who sends a request: the value of a header that the operator's proxy sets, or a digest of the API key.

The front end names the principal in the request's sampling parameters, over whatever a client put there, and so it
reaches the engine.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from spider_sense.types import UNKNOWN

__all__ = ["UNKNOWN", "Principals", "name_principal", "principal_of"]

_ARGUMENT = "spider_sense_principal"
"""Key in ``SamplingParams.extra_args``, which clients can fill too (``vllm_xargs``)."""


class Principals:
    """Tells principals apart by the headers of their requests.

    Args:
        header: the one that names them; None for the API key.
        keys: the server's API keys.
    """

    def __init__(self, header: str | None, keys: Sequence[str]) -> None:
        self._header = (header or "authorization").lower().encode()
        self._by_key = header is None
        self._known = {_digest(key.encode()) for key in keys}

    def principal(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return who sends a request, ``UNKNOWN`` if it does not tell, or tells twice.

        Args:
            headers: names in lower case, and values.
        """
        values = [value.strip() for name, value in headers if name.lower() == self._header]
        if len(values) != 1 or not values[0]:
            return UNKNOWN
        return self._holder(values[0]) if self._by_key else values[0].decode("latin-1")

    def _holder(self, value: bytes) -> str:
        scheme, _, key = value.partition(b" ")
        digest = _digest(key)
        # Some paths are open to clients without a key, who may send any.
        return digest if scheme.lower() == b"bearer" and digest in self._known else UNKNOWN


def name_principal(params: Any, principal: str | None) -> None:
    """Write a principal into the sampling parameters of a request, or out of them if it is None."""
    others = {key: value for key, value in (params.extra_args or {}).items() if key != _ARGUMENT}
    named = {} if principal is None else {_ARGUMENT: principal}
    params.extra_args = {**others, **named} or None


def principal_of(params: Any) -> str | None:
    """Return the principal that the front end has written into sampling parameters."""
    found = None if params is None else (params.extra_args or {}).get(_ARGUMENT)
    return found if isinstance(found, str) else None


def _digest(key: bytes) -> str:
    """Return what stands for an API key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key).hexdigest()[:16]

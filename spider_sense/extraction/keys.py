"""Keyed hashes: what is kept of texts, parameters and identities cannot be turned back or forged without the key.

BLAKE2b with a key, 64 bits. Zero is kept for "unknown".
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeGuard

from spider_sense.errors import ConfigError

__all__ = ["Key"]

LEAST = 16
"""Bytes of a secret."""
OPENING = 8
"""Words of a text's opening."""

_MASKS = (
    (re.compile(r"```.*?```", re.DOTALL), " code "),
    (re.compile(r"https?://\S+"), " link "),
    (
        re.compile('"[^"\n]{1,200}"|\N{LEFT DOUBLE QUOTATION MARK}[^\n]{1,200}?\N{RIGHT DOUBLE QUOTATION MARK}'),
        " quote ",
    ),
    (re.compile(r"\d+(?:[.,]\d+)*"), " number "),
)
_WORD = re.compile(r"\w+")


class Key:
    """Hashes under one secret.

    Args:
        secret: at least 16 random bytes; another secret makes every hash incomparable.

    Raises:
        ConfigError: if the secret is shorter.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < LEAST:
            raise ConfigError(f"the key has {len(secret)} bytes; write at least {LEAST} random ones")
        self._secret = hashlib.blake2b(secret, digest_size=32).digest()

    @classmethod
    def read(cls, path: str | Path) -> "Key":
        """Read a file of raw bytes.

        Raises:
            ConfigError: if it cannot be read or is too short.
        """
        try:
            return cls(Path(path).read_bytes())
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except OSError as error:
            raise ConfigError(
                f"cannot read {path}: {error.strerror}; name a file of {LEAST} random bytes or more"
            ) from error

    @classmethod
    def create(cls, path: Path) -> "Key":
        """Write a new random key, readable by its owner alone, and return it.

        Raises:
            ConfigError: if the file exists or cannot be written: a key that is replaced orphans every state.
        """
        try:
            # Never readable by others, not even while it is empty: who holds it open then reads it later.
            with open(path, "xb", opener=partial(os.open, mode=0o600)) as stream:
                stream.write(secrets.token_bytes(32))
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; name a new file") from error
        return cls.read(path)

    @property
    def digest(self) -> str:
        """Names the key without giving it away; artifacts and stores compare it."""
        return hashlib.blake2b(b"name", key=self._secret, digest_size=16).hexdigest()

    def hash(self, kind: str, text: str) -> int:
        """Return 64 bits, never 0; the same text under another kind gives another hash."""
        message = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(message, key=self._secret, digest_size=8).digest(), "little") or 1

    def seed(self, principal: str) -> int:
        """Return the seed of a principal's random choices."""
        return self.hash("principal", principal)

    def parameters(self, parameters: Mapping[str, object]) -> int:
        """Return the hash of a tuple of sampling parameters, 1 and 1.0 being one; 0 if there is none."""
        if not parameters:
            return 0
        same = {name: int(value) if _is_whole(value) else value for name, value in parameters.items()}
        return self.hash("parameters", json.dumps(same, sort_keys=True, default=str))

    def opening(self, text: str) -> int:
        """Return the hash of a text's masked opening, 8 words; 0 if there is no word.

        Numbers, quotes, links and code are masked, so requests that fill one template share a hash.
        """
        for pattern, mask in _MASKS:
            text = pattern.sub(mask, text)
        words = _WORD.findall(text.lower())
        return self.hash("opening", " ".join(words[:OPENING])) if words else 0


def _is_whole(value: object) -> TypeGuard[float]:
    return isinstance(value, float) and value.is_integer()

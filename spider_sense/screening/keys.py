"""The operator's secret key, from which each use derives a key of its own."""

import hashlib
import os

from spider_sense.errors import ConfigError

__all__ = ["OperatorKey"]

_SHORTEST = 32


class OperatorKey:
    """A secret that the screening processes share and no agent holds.

    Args:
        secret: at least 32 bytes.

    Raises:
        ConfigError: if it is shorter.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < _SHORTEST:
            raise ConfigError(
                f"the operator's key has {len(secret)} bytes, fewer than {_SHORTEST}; make one: openssl rand -hex 32"
            )
        self._secret = secret

    @classmethod
    def from_env(cls, variable: str) -> "OperatorKey":
        """Read the key from an environment variable.

        Raises:
            ConfigError: if it is not set or too short.
        """
        secret = os.environ.get(variable)
        if not secret:
            raise ConfigError(f"the environment variable {variable} holds no key; set it to: openssl rand -hex 32")
        return cls(secret.encode())

    def derived(self, use: str) -> bytes:
        """Return a key of 32 bytes for one use alone."""
        return hashlib.blake2b(use.encode(), key=hashlib.blake2b(self._secret).digest(), digest_size=32).digest()

    def __repr__(self) -> str:
        return "OperatorKey(...)"

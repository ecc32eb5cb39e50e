"""Everything that is kept of one principal, as bytes of a fixed length."""

import struct
import zlib
from dataclasses import dataclass
from typing import Self

import numpy as np

from spider_sense.errors import StateError
from spider_sense.extraction.layout import EMPTY_LINK, LINK_KINDS, STATE, VERSION, States

__all__ = ["PrincipalState", "fresh"]

_HEADER = struct.Struct("<4sHI")
_MAGIC = b"SSps"


def fresh(seeds: list[int]) -> States:
    """Return the states [N] of principals that were never seen.

    Args:
        seeds: ``Key.seed`` of each.
    """
    states = np.zeros(len(seeds), dtype=STATE)
    states["seed"] = np.array(seeds, dtype=np.uint64)
    states["links"] = EMPTY_LINK
    states["bets"] = -np.inf
    states["own"] = states["level"] = -np.inf
    return states


@dataclass(frozen=True, slots=True, eq=False)
class PrincipalState:
    """One principal's state. Nothing changes it; an update returns another."""

    states: States
    """[1]."""

    SIZE = _HEADER.size + STATE.itemsize
    """Bytes of ``to_bytes``."""

    @classmethod
    def open(cls, seed: int) -> Self:
        """Return the state of a principal that was never seen; ``seed`` is ``Key.seed`` of its name."""
        return cls(fresh([seed]))

    @property
    def count(self) -> int:
        """Requests so far."""
        return int(self.states["count"][0])

    @property
    def first(self) -> float:
        """Time of the first request, in seconds since the epoch; 0 before it."""
        return float(self.states["first"][0])

    @property
    def last(self) -> float:
        """Time of the last request, in seconds since the epoch; 0 before it."""
        return float(self.states["last"][0])

    @property
    def tenant(self) -> str:
        """Declared type of the principal."""
        return bytes(self.states["tenant"][0]).decode("ascii")

    def undeclared(self) -> Self:
        """Return the state without what it kept of being declared one with others."""
        states = self.states.copy()
        states["links"][:, LINK_KINDS.index("declared")] = EMPTY_LINK
        return type(self)(states)

    def to_bytes(self) -> bytes:
        """Return ``SIZE`` bytes: a header with version and checksum, and the record."""
        body = self.states.tobytes()
        return _HEADER.pack(_MAGIC, VERSION, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what ``to_bytes`` wrote.

        Raises:
            StateError: if the bytes are cut, damaged, or of another version.
        """
        if len(data) < _HEADER.size or data[:4] != _MAGIC:
            raise StateError(f"{len(data)} bytes beginning with {data[:4]!r} are no principal's state; erase it")
        _, version, checksum = _HEADER.unpack_from(data)
        if version != VERSION:
            raise StateError(f"a state has layout {version}, this library reads {VERSION}; start the store anew")
        body = data[_HEADER.size :]
        if len(body) != STATE.itemsize or zlib.crc32(body) != checksum:
            raise StateError(
                f"a state of {len(data)} bytes is damaged (expected {cls.SIZE}, with another checksum); erase it"
            )
        return cls(np.frombuffer(body, dtype=STATE).copy())

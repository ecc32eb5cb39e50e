"""What a store of principals must do, whatever keeps it.

A state is bytes that the store never reads. It is changed by a pure function of itself, which a store may call more
than once: where two writers meet, one of them is asked again.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from spider_sense.errors import SpiderSenseError

__all__ = [
    "LONGEST_NAME",
    "BadNameError",
    "Change",
    "Entry",
    "Store",
    "StoreError",
    "check_clock",
    "check_names",
    "check_owner",
    "missing",
    "moment",
]

LONGEST_NAME = 512
"""Bytes of a principal's name in UTF-8."""
_DAY = 86_400.0
_PAUSE = 30 * _DAY
"""Seconds between two expiries that need no explaining; an unnoticed error of the clock is smaller."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one principal."""

    state: bytes
    standing: str = ""
    """What is to be done about it, in the words of whoever folds; empty for nothing."""


Change = Callable[[Entry | None], Entry]
"""Takes what is kept of a principal, None of one that is new, and returns what is to be kept. It must have no side
effects."""


class StoreError(SpiderSenseError):
    """A store cannot be opened, reached, read or written.

    Args:
        message: what happened, and the next step.
        committed: principals of the failed call whose changes are durable nevertheless; a second try leaves them out.
    """

    def __init__(self, message: str, committed: Collection[str] = ()) -> None:
        super().__init__(message)
        self.committed = frozenset(committed)


class BadNameError(SpiderSenseError, ValueError):
    """No principal can be named so."""


class Store(Protocol):
    """Keeps the state of principals. Threads may share one; processes open one each.

    Every method raises ``StoreError`` if what keeps the data fails, and ``BadNameError`` for a name that is empty or
    longer than ``LONGEST_NAME``.
    """

    def claim(self, owner: str) -> None:
        """Say what its states are made by; raise ``StoreError`` if they are another's, and so not comparable."""

    def read(self, principal: str) -> bytes | None:
        """Return a principal's state, None if there is none."""

    def update(self, changes: Mapping[str, Change], seen: float | None = None) -> dict[str, Entry]:
        """Change some principals, each atomically, at the price of one write to the disk.

        Args:
            changes: by principal. If one raises, nothing is changed, and that is what this raises; a store that
                has committed others by then raises ``StoreError``, which names them.
            seen: when they were last seen, in seconds since 1970; None for now.

        Returns:
            What is kept of each now: durably, so that neither a killed process nor a power cut takes it back.
        """

    def principals(self) -> Iterator[tuple[str, bytes]]:
        """Yield every principal with its state, in no order; those that change meanwhile appear before or after."""

    def standings(self) -> Iterator[tuple[str, str]]:
        """Yield every standing that is not empty; a principal may appear twice, by itself and by its group."""

    def mark_groups(self, standings: Mapping[str, str]) -> None:
        """Replace all that is said of principals because of the group that they are in.

        Who has no state is passed over: it was erased while the groups were looked for.
        """

    def clear(self, principals: Collection[str]) -> int:
        """Take back the standings of some principals, and return how many had one; their states stay."""

    def link(self, principals: Collection[str]) -> None:
        """Declare that some principals, and all that they are linked with, are one; they may be new.

        The link keeps its name where one of them is in one, the first by name if in several: states tell it.
        """

    def unlink(self, principals: Collection[str]) -> int:
        """Take some principals out of what they are linked with, and return how many were in it; the others stay."""

    def linked(self, principal: str) -> frozenset[str]:
        """Return whom a principal is linked with, itself included."""

    def links(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Yield the name of every link, and the principals that it joins; a name is never used again."""

    def erase(self, principals: Collection[str]) -> int:
        """Remove all that is kept of some principals, from the files too, and return how many had a state."""

    def expire(self, before: float, sure: bool = False) -> int:
        """Erase those that were last seen before a time, in seconds since 1970, and return how many.

        Who was seen in the future, under a clock that was ahead, is seen now.

        Args:
            before: the time.
            sure: whether somebody vouches for the clock. If not, it must go on from the last expiry, or nobody is
                erased and ``StoreError`` says what to do.
        """

    def __len__(self) -> int:
        """Return how many principals have a state."""

    def close(self) -> None:
        """Let go of the store; a second call does nothing."""


def check_clock(place: str, last: float) -> float:
    """Return the time in seconds since 1970, if it goes on from the last expiry of the store at a place.

    Raises:
        StoreError: if it lies more than 30 days from it: the clock is wrong, or was.
    """
    now = time.time()
    if abs(now - last) > _PAUSE:
        raise StoreError(
            f"{place}: it is {datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC by this machine's clock, "
            f"{abs(now - last) / _DAY:.0f} days {'after' if now > last else 'before'} the last expiry, so nobody is "
            "erased; set the clock if that is wrong, and run `spider-sense principals expire` once if it is right, as "
            "after a pause or where retention begins only now"
        )
    return now


def check_names(principals: Collection[str]) -> None:
    """Check that names can be kept.

    Raises:
        BadNameError: naming the first that cannot.
    """
    for name in principals:
        size = len(name.encode("utf-8", "surrogatepass"))
        if not 0 < size <= LONGEST_NAME or "\0" in name or size != len(name.encode("utf-8", "ignore")):
            raise BadNameError(
                f"{name[:40]!r} cannot be a principal's name: it takes 1 to {LONGEST_NAME} bytes of UTF-8 without a "
                "zero; name whom a request belongs to by something shorter, such as a digest"
            )


def check_owner(place: str, found: str, owner: str) -> None:
    """Check that the states at a place are made by an owner.

    Raises:
        StoreError: if they are another's.
    """
    if found != owner:
        raise StoreError(
            f"{place} holds states that were made by {found}, not by {owner}: by another extraction guard, or under "
            "another key; use that one, or begin a new store"
        )


def missing(place: str) -> StoreError:
    """Return the error for a place where no store is, and none is to be made."""
    return StoreError(
        f"{place} holds no store of principals; name the one that a server keeps, which makes it when it first starts"
    )


def moment(seen: float | None) -> float:
    """Return a time in seconds since 1970, now if None."""
    return time.time() if seen is None else seen

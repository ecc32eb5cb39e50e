"""Fixed, seeded subsets of rows: the same rows in every run, and a row that is added to a file moves no other."""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from spider_sense.errors import ConfigError

__all__ = ["split_off", "subset"]

Row = TypeVar("Row")


def subset(rows: Sequence[Row], limit: int | None, seed: int, name: Callable[[Row], str]) -> list[Row]:
    """Return the first rows by the SHA-256 of seed and name, in the order of the file.

    Args:
        rows: all rows.
        limit: how many; None for all.
        seed: another seed gives another subset.
        name: a row's name, its own among the rows.

    Raises:
        ConfigError: if the limit is not positive.
    """
    return split_off(rows, limit, seed, name)[0]


def split_off(
    rows: Sequence[Row], limit: int | None, seed: int, name: Callable[[Row], str]
) -> tuple[list[Row], list[Row]]:
    """Return the rows that :func:`subset` gives, and all others; see there for the arguments."""
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} rows; give at least 1, or none for all rows")
    order = sorted(range(len(rows)), key=lambda place: _rank(seed, name(rows[place])))
    chosen = set(order if limit is None else order[:limit])
    return (
        [row for place, row in enumerate(rows) if place in chosen],
        [row for place, row in enumerate(rows) if place not in chosen],
    )


def _rank(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).hexdigest()

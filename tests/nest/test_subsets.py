"""Subsets that stay the same."""

import pytest

from nest.subsets import split_off, subset
from spider_sense.errors import ConfigError

ROWS = [f"row-{number}" for number in range(40)]


def name(row: str) -> str:
    return row


def test_a_subset_is_fixed_by_its_seed_and_keeps_the_order() -> None:
    chosen = subset(ROWS, 10, 0, name)
    assert chosen == [row for row in ROWS if row in set(chosen)]
    assert subset(ROWS[::-1], 10, 0, name) == chosen[::-1]
    assert subset(ROWS, 10, 1, name) != chosen


def test_a_larger_limit_or_file_keeps_rows() -> None:
    few = set(subset(ROWS, 10, 0, name))
    many = set(subset(ROWS, 20, 0, name))
    assert few < many
    more = [*ROWS, "row-new"]
    after = set(subset(more, 10, 0, name))
    assert len(few - after) <= 1


def test_what_is_left_is_everything_else() -> None:
    chosen, left = split_off(ROWS, 10, 0, name)
    assert sorted(chosen + left) == sorted(ROWS)
    assert split_off(ROWS, None, 0, name) == (list(ROWS), [])
    assert subset(ROWS, 99, 0, name) == ROWS


def test_no_rows_is_no_limit() -> None:
    with pytest.raises(ConfigError, match="a limit of 0"):
        subset(ROWS, 0, 0, name)

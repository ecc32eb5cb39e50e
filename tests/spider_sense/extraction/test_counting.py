"""Small counters against exact ones."""

from collections import Counter

import numpy as np
import pytest

from spider_sense.extraction.counting import count_key, distinct, register_of
from spider_sense.extraction.mixing import bit_length, mix


@pytest.mark.parametrize("count", [0, 1, 20, 500, 3000, 50_000])
def test_distinct_values_are_counted_within_three_standard_errors(count: int) -> None:
    hashes = mix(np.zeros(count, dtype=np.uint64), np.arange(count, dtype=np.uint64))
    registers = np.zeros((1, 1024), dtype=np.uint8)
    for _ in range(2):  # what comes again is not counted again
        index, rank = register_of(hashes, 1024)
        np.maximum.at(registers[0], index, rank)
    assert distinct(registers)[0] == pytest.approx(count, rel=3 * 1.04 / 32, abs=0.5)


def test_the_most_frequent_are_within_the_bound_of_misra_and_gries() -> None:
    rng = np.random.default_rng(0)
    stream = rng.zipf(1.5, 2000) % 300 + 1
    keys, counts = np.zeros((1, 16), dtype=np.uint64), np.zeros((1, 16), dtype=np.uint32)
    for key in stream:
        count_key(keys, counts, np.array([key], dtype=np.uint64))
    exact = Counter(stream.tolist())
    kept = {int(key): int(count) for key, count in zip(keys[0], counts[0], strict=True) if count}
    for key, count in exact.items():
        assert count - 2000 / 17 <= kept.get(key, 0) <= count


def test_zero_is_not_counted() -> None:
    keys, counts = np.zeros((2, 4), dtype=np.uint64), np.zeros((2, 4), dtype=np.uint32)
    count_key(keys, counts, np.array([0, 7], dtype=np.uint64))
    assert counts.sum(axis=1).tolist() == [0, 1]


def test_bit_lengths() -> None:
    numbers = [0, 1, 2, 3, 4, 255, 256, 2**52]
    assert bit_length(np.array(numbers, dtype=np.uint64)).tolist() == [number.bit_length() for number in numbers]

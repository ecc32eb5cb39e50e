"""Which texts hold a good part of one another, word for word."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

__all__ = ["overlapping"]

LONGEST, SHORTEST = 8, 5
"""Words of a sequence that is compared. Four in a row are shared by texts that have nothing else in common."""

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
Sequences = dict[tuple[str, ...], list[int]]


def overlapping(texts: Sequence[str], others: Sequence[str]) -> set[int]:
    """Return which of the texts hold half of one of the others, or have half of themselves in one.

    A half is half of the sequences of eight words, so that a wrapper around another payload is found, and so is a
    payload within a wrapper. A text of five to seven words is one sequence; shorter ones are compared as a whole. In
    scripts without spaces (Chinese, Japanese, Thai) a character counts as a word.
    """
    words, other_words = [_words(text) for text in texts], [_words(text) for text in others]
    return {inner for inner, _ in _held(words, other_words)} | {outer for _, outer in _held(other_words, words)}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _held(inner: Sequence[list[str]], outer: Sequence[list[str]]) -> Iterator[tuple[int, int]]:
    """Yield each pair of which the outer one holds half of the inner one."""
    owners: Sequences = defaultdict(list)
    counts = [0] * len(inner)
    for index, words in enumerate(inner):
        own = set(_sequences(words, _length(words)))
        counts[index] = len(own)
        for sequence in own:
            owners[sequence].append(index)
    for place, words in enumerate(outer):
        lengths = {*range(SHORTEST, LONGEST + 1), *((len(words),) if len(words) < SHORTEST else ())}
        shared = Counter(
            index
            for length in lengths
            for sequence in set(_sequences(words, length))
            for index in owners.get(sequence, ())
        )
        yield from ((index, place) for index, count in shared.items() if 2 * count >= counts[index])


def _length(words: Sequence[str]) -> int:
    return min(len(words), LONGEST)


def _sequences(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1 if length else 0))

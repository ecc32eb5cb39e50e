"""Known query lists."""

import pytest

from spider_sense.errors import DataError
from spider_sense.extraction.lists import KnownLists

GEESE = "A farmer has 12 geese and 7 sheep in a barn near the river; how many legs are there in all?"
VERSE = "Write a short poem about a lighthouse keeper who has never once in his life seen the sea."
LISTS = KnownLists.build({"sums": [GEESE, "Tom buys nine apples and pays with a note"], "verse": [VERSE]})


def test_texts_of_a_list_are_found_reworded_a_little_or_not() -> None:
    assert LISTS.find(GEESE) == 0
    assert LISTS.find(VERSE.upper()) == 1
    assert LISTS.find(f"{VERSE} Thanks!") == 1
    assert LISTS.find("How do I poach an egg without it falling apart in the water?") == -1
    assert LISTS.find("") == -1


def test_signatures_alone_restore_the_index() -> None:
    again = KnownLists.restore(LISTS.names, LISTS.owner_M, LISTS.signatures_MH)
    assert [again.find(text) for text in (GEESE, VERSE, "other")] == [0, 1, -1]


def test_too_many_or_empty_lists_are_refused() -> None:
    with pytest.raises(DataError, match="9 known lists"):
        KnownLists.build({str(index): ["x"] for index in range(9)})
    with pytest.raises(DataError, match="'b' holds no text"):
        KnownLists.build({"a": ["x"], "b": []})

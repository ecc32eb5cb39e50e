"""What a clear covers, and what is more than that."""

from dataclasses import replace
from typing import Any

import pytest

from spider_sense.errors import StateError
from spider_sense.extraction.clearing import Cleared, cleared, cleared_of, marked, record_of, uncovered
from spider_sense.extraction.decision import Decision


@pytest.fixture
def seen(helpers: Any) -> Decision:
    """A group of three, limited."""
    found: Decision = helpers.decision("ann", "limit", "group")
    return replace(found, score=0.8, accounts=3, count=100)


@pytest.mark.parametrize(
    ("change", "covered"),
    [
        ({}, True),
        ({"level": "watch", "score": 0.7, "accounts": 2, "count": 5000, "time": 1e9, "evidence": ()}, True),
        ({"level": "act"}, False),
        ({"score": 0.81}, False),
        ({"score": float("nan")}, False),
        ({"accounts": 4}, False),
        ({"tier": "level"}, False),
        ({"accounts": 1}, False),
    ],
)
def test_what_is_no_more_is_covered(seen: Decision, change: dict[str, Any], covered: bool) -> None:
    found = replace(seen, **change)
    assert Cleared(seen, 1.0).covers(found) is covered
    clears = {"ann": [Cleared(seen, 1.0)]}
    assert uncovered([found, replace(found, principal="bob")], clears) == [
        *([] if covered else [found]),
        replace(found, principal="bob"),
    ]


def test_of_rules_twice_the_requests_are_more(seen: Decision) -> None:
    """Their score is their level, and never grows."""
    rule = replace(seen, tier="rule", level="act", score=3.0)
    assert Cleared(rule, 1.0).covers(replace(rule, count=199))
    assert not Cleared(rule, 1.0).covers(replace(rule, count=200))


def test_what_is_kept_reads_back_without_the_names_of_others(seen: Decision) -> None:
    kept = record_of([Cleared(replace(seen, score=float("inf")), 2.5)])
    assert cleared_of(kept) == (Cleared(replace(seen, score=float("inf"), group=()), 2.5),)
    assert record_of([]) == ""
    with pytest.raises(StateError, match=r"is no clear that a store kept.*clear its principal"):
        cleared_of(kept.replace("limit", "ban"))


def test_a_later_clear_takes_the_place_of_what_it_covers(seen: Decision) -> None:
    level, more = replace(seen, tier="level"), replace(seen, score=0.9)
    before = cleared([], [seen, level], 1.0)
    assert cleared(before, [more], 2.0) == (Cleared(level, 1.0), Cleared(more, 2.0))


def test_a_finding_says_that_it_was_cleared(seen: Decision) -> None:
    one, other = marked([seen, replace(seen, level="act")], {"ann": [Cleared(seen, 0.0)]})
    assert one.evidence == (*seen.evidence, "cleared by an operator, 1970-01-01 00:00")
    assert other == replace(seen, level="act")

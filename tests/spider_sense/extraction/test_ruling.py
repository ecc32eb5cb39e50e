"""What a whole log shows of each principal."""

from dataclasses import replace
from typing import Any

import pytest

from spider_sense.cli.extraction_tables import findings_table, group_lines, selection_lines
from spider_sense.extraction.decision import Decision
from spider_sense.extraction.ruling import Ruling


@pytest.fixture
def ruling(helpers: Any) -> Ruling:
    """The same level by own history, level and a rule, a lower one, and a group."""
    decision = helpers.decision
    found = [
        *(decision("ann", "watch", tier) for tier in ("level", "own", "rule")),
        *(decision("bob", "watch", "rule"), decision("bob", "limit", "level"), decision("bob", "watch", "own")),
        *(decision("cid", "act", "level"), decision("cid", "act", "level"), decision("dan", "act", "group")),
    ]
    return Ruling({}, {}, tuple(found), ())


def test_every_tier_of_the_highest_level_is_shown_and_rules_come_first(ruling: Ruling) -> None:
    shown = {name: [(one.level, one.tier) for one in found] for name, found in ruling.highest().items()}
    assert shown == {
        "cid": [("act", "level")],
        "dan": [("act", "group")],
        "bob": [("limit", "level")],
        "ann": [("watch", "rule"), ("watch", "own"), ("watch", "level")],
    }
    assert list(shown) == ["cid", "dan", "bob", "ann"]
    assert {name: found.tier for name, found in ruling.worst().items()} == {
        "cid": "level", "dan": "group", "bob": "level", "ann": "rule",
    }  # fmt: skip


def test_the_table_names_a_principal_once(ruling: Ruling) -> None:
    table = findings_table(ruling)
    names, levels, tiers = (list(table.columns[place].cells) for place in range(3))
    assert [str(name) for name in names] == ["cid", "dan", "bob", "ann", "", ""]
    assert levels[3:] == ["watch"] * 3
    assert tiers[3:] == ["rule", "own", "level"]


def test_a_group_is_named_with_its_highest_level_and_ten_members(helpers: Any) -> None:
    members = tuple(f"m{place:02}" for place in range(12))
    large = [_of(helpers.decision(name, "limit", "group"), members) for name in members]
    small = [
        _of(helpers.decision("x", "watch", "group"), ("x", "y")),
        _of(helpers.decision("x", "act", "rule"), ("x", "y")),
    ]
    alone = _of(helpers.decision("z", "act", "own"), ())
    assert list(group_lines([*large, *small, alone])) == [
        "group, limit: m00, m01, m02, m03, m04, m05, m06, m07, m08, m09 and 2 more",
        "group, act: x, y",
    ]
    assert list(selection_lines([*large, alone])) == [f"selected, {alone.level}: {alone.principal}"]


def _of(decision: Decision, members: tuple[str, ...]) -> Decision:
    return replace(decision, group=members)

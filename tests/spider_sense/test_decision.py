"""Decisions: what is stricter than what."""

from spider_sense.decision import SEVERITY
from spider_sense.types import ACTIONS


def test_severity_orders_every_action() -> None:
    assert sorted(SEVERITY) == sorted(ACTIONS)
    assert (SEVERITY[0], SEVERITY[-1]) == ("observe", "stop")

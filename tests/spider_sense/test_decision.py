"""Decisions: what is stricter than what."""

from typing import get_args

from spider_sense.decision import SEVERITY
from spider_sense.types import Action


def test_severity_orders_every_action() -> None:
    assert sorted(SEVERITY) == sorted(get_args(Action))
    assert (SEVERITY[0], SEVERITY[-1]) == ("observe", "stop")

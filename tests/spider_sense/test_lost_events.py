"""Every event that is lost is counted; the log of the process says so once a minute."""

import logging
from types import SimpleNamespace

import pytest

from spider_sense import lost_events
from spider_sense.lost_events import LostEvents


def test_each_is_counted_and_a_full_disk_floods_no_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [5.0]
    monkeypatch.setattr(lost_events, "time", SimpleNamespace(monotonic=lambda: now[0]))
    lost = LostEvents()
    with caplog.at_level(logging.ERROR, logger="spider_sense.lost_events"):
        for now[0] in (5.0, 6.0, 64.9):
            lost.add(OSError("No space left on device"))
        assert lost.take() == 3
        now[0] = 65.0
        lost.add(OSError("No space left on device"))
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "the audit log did not take 1 events (No space left on device)",
        "the audit log did not take 3 events (No space left on device)",
    ]
    assert (lost.take(), lost.take()) == (1, 0)

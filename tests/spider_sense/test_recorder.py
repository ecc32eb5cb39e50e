"""The recorder: what an event says of a request, and what becomes of one that cannot be recorded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.case import Case
from spider_sense.decision import Decision
from spider_sense.lost_events import LostEvents
from spider_sense.recorder import UNRECORDED, Recorder
from spider_sense.scoring import Request
from spider_sense.types import Action, Verdict


@pytest.fixture
def case() -> Case:
    request = Request("r", slot=0, prompt_length=3, skip=0, tail=0, principal="acme", scored=2, missing=1)
    thresholds, peak, zone = np.zeros((2, 1)), np.zeros(1), np.zeros(1, dtype=np.int8)
    return Case(request, thresholds, peak, zone, decided("observe"), position=2, patched_from=4)


def decided(action: Action, verdict: Verdict | None = None) -> Decision:
    return Decision(action=action, verdict=verdict, reason="why")


class Full:
    """As much of an audit log as the recorder touches, on a disk that is full."""

    include_text = True

    def write(self, event: AuditEvent) -> None:
        raise OSError("No space left on device")


@pytest.mark.parametrize("keeps", [False, True])
def test_an_event_says_what_there_is_to_say(case: Case, tmp_path: Path, keeps: bool) -> None:
    verdict = Verdict("misuse", 1.5, 2.0, "suspect", 2, case.coverage)
    with AuditLog(tmp_path / "log", include_text=keeps) as log:
        recorder = Recorder(log)
        recorder.guard = "abc"
        assert recorder.keeps_text == keeps
        assert recorder.record(case, "open", text="hello")
        assert recorder.decided(case, "verdict", decided("flag", verdict)) == decided("flag", verdict)
        assert recorder.record(case, "action", decided("stop"))
    first, second, third = map(AuditEvent.model_validate_json, (tmp_path / "log").read_text().splitlines())
    assert (first.request, first.principal, first.guard, first.position, first.patched_from) == (
        "r",
        "acme",
        "abc",
        2,
        4,
    )
    assert (first.event, first.coverage, first.text) == ("open", case.coverage, "hello" if keeps else None)
    assert (first.action, first.detector) == (None, None)
    assert (second.event, second.action, second.reason, second.text) == ("verdict", "flag", "why", None)
    assert (second.detector, second.zone, second.score, second.threshold) == ("misuse", "suspect", 1.5, 2.0)
    assert (third.event, third.action, third.detector, third.score) == ("action", "stop", None, None)


def test_without_a_log_nothing_is_lost(case: Case) -> None:
    recorder = Recorder(None)
    assert recorder.record(case, "open", text="hello")
    assert recorder.decided(case, "action", decided("flag")) == decided("flag")
    assert (recorder.keeps_text, recorder.take_lost()) == (False, 0)


def test_of_what_nothing_is_recorded_is_stopped(case: Case) -> None:
    log: Any = Full()
    recorder = Recorder(log, LostEvents())
    assert not recorder.record(case, "open")
    assert recorder.decided(case, "action", decided("flag")) is UNRECORDED
    assert recorder.decided(case, "action", decided("stop")) == decided("stop"), "it keeps its own reason"
    assert (recorder.take_lost(), recorder.take_lost()) == (3, 0)
    with pytest.raises(OSError, match="No space left"):
        Recorder(log).record(case, "open")

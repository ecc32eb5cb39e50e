"""The judge: zones that never fall back, decisions that fail closed, and what the audit log says of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spider_sense.audit import AuditEvent, AuditLog
from spider_sense.case import Case
from spider_sense.guard import Guard
from spider_sense.judge import Judge
from spider_sense.lost_events import LostEvents
from spider_sense.models import LoadedModel
from spider_sense.policy import Policy
from spider_sense.scoring import Aggregator, Probe, RequestRows, SiteMap
from spider_sense.types import Site

PROMPT = [1, 5, 20, 21, 22, 23]


@pytest.fixture
def guard(guards: Any, tiny_loaded: LoadedModel) -> Guard:
    """Two detectors, the running mean and the greatest of one column each; longer prompts have higher thresholds."""

    def probe(name: str, kind: Any) -> Probe:
        return Probe(
            name, "none", Aggregator(kind=kind), {Site.parse("resid.0"): SiteMap(torch.zeros(32, 1), torch.zeros(1))}
        )

    thresholds = guards.calibration(1.0, 2.0, longer=(10.0, 20.0), bound=8)
    result: Guard = guards.guard(tiny_loaded, [probe("average", "mean"), probe("top", "max")], thresholds)
    return result


def feed(judge: Judge, case: Case, values: Sequence[tuple[float, float]], first: int | None = None) -> list[Case]:
    """Fold rows and judge; the first row is the next position, or the one that is given."""
    rows = np.arange(len(values))
    start = case.request.position if first is None else first
    judge.step(torch.tensor(values), [RequestRows(case.request, rows, rows + start)])
    return judge.decide(judge.read([case]))


def clear_prompt(judge: Judge, length: int = len(PROMPT)) -> Case:
    case = judge.open("r", (PROMPT * 4)[:length])
    feed(judge, case, [(0.0, 0.0)] * length)
    return case


class Refusing:
    """As much of an audit log as the judge touches, on a disk that is full for some events."""

    def __init__(self, *refused: str) -> None:
        self.refused, self.written = refused, list[AuditEvent]()

    def write(self, event: AuditEvent) -> None:
        if event.event in self.refused:
            raise OSError("No space left on device")
        self.written.append(event)


@pytest.mark.parametrize(
    ("refused", "value", "exempt", "action", "reason", "lost"),
    [
        (["open"], 0.0, False, "stop", "could not be recorded", 1),
        (["open"], 0.0, True, "stop", "could not be recorded", 1),
        (["open", "verdict", "action", "close"], 2.0, False, "stop", "could not be recorded", 2),
        (["verdict"], 1.0, False, "stop", "could not be recorded", 1),
        (["verdict"], 1.0, True, "stop", "could not be recorded", 1),
        (["verdict"], 2.0, False, "stop", "rule 1", 1),
        (["action"], 1.0, False, "stop", "could not be recorded", 1),
        (["action"], 2.0, False, "stop", "rule 1", 1),
        (["close"], 1.0, False, "flag", "rule 2", 1),
        ([], 1.0, False, "flag", "rule 2", 0),
    ],
)
def test_what_cannot_be_recorded_is_stopped_alone(
    guard: Guard, refused: list[str], value: float, exempt: bool, action: str, reason: str, lost: int
) -> None:
    log: Any = Refusing(*refused)
    stricter: list[str] = []
    judge = Judge(
        guard,
        Policy.default(),
        log,
        exempt=["p"] if exempt else (),
        lost=LostEvents(),
        on_decision=lambda case: stricter.append(case.decision.action),
    )
    case = judge.open("r", PROMPT, "p")
    feed(judge, case, [(value, value)] * len(PROMPT))
    judge.close(case)
    assert case.decision.action == action
    assert stricter == [action]
    assert reason in case.decision.reason
    assert judge.recorder.take_lost() == lost
    assert judge.recorder.take_lost() == 0
    assert not {event.event for event in log.written} & set(refused)
    assert len(judge.scorer.stream._free) == len(judge.scorer.stream._state)


def test_without_whom_to_tell_an_event_that_is_lost_is_an_error(guard: Guard) -> None:
    log: Any = Refusing("open")
    judge = Judge(guard, Policy.default(), log)
    with pytest.raises(OSError, match="No space left"):
        judge.open("r", PROMPT)
    assert len(judge.scorer.stream._free) == len(judge.scorer.stream._state)


@pytest.mark.parametrize(
    ("length", "value", "zones"),
    [
        (6, 0.99, ("clear", "clear")),
        (6, 1.0, ("suspect", "suspect")),
        (8, 1.99, ("suspect", "suspect")),
        (8, 2.0, ("breach", "breach")),
        (9, 2.0, ("clear", "clear")),
        (20, 10.0, ("suspect", "suspect")),
        (20, 20.0, ("breach", "breach")),
        (6, math.nan, ("breach", "breach")),
        (6, math.inf, ("breach", "breach")),
        (20, -math.inf, ("breach", "breach")),
    ],
)
def test_zones_go_by_the_length_of_the_prompt(guard: Guard, length: int, value: float, zones: tuple[str, str]) -> None:
    judge = Judge(guard, Policy.default())
    case = judge.open("r", (PROMPT * 4)[:length])
    feed(judge, case, [(value, value)] * length)
    assert tuple(verdict.zone for verdict in case.verdicts) == zones
    assert [verdict.threshold for verdict in case.verdicts] == [2.0 if length <= 8 else 20.0] * 2
    assert [verdict.position for verdict in case.verdicts] == [length - 1] * 2
    assert case.decision.action == {"clear": "observe", "suspect": "flag", "breach": "stop"}[zones[0]]


def test_the_bucket_of_the_prompt_holds_while_the_answer_grows(guard: Guard) -> None:
    judge = Judge(guard, Policy.default())
    case = clear_prompt(judge, 8)
    feed(judge, case, [(0.0, 0.0)] * 30 + [(0.0, 2.5)])
    assert case.verdicts[1].zone == "breach"


def test_nothing_is_judged_before_the_end_of_the_prompt(guard: Guard) -> None:
    judge = Judge(guard, Policy.default())
    case = judge.open("r", PROMPT)
    assert feed(judge, case, [(0.0, 9.0)] * 5) == []
    assert [verdict.zone for verdict in case.verdicts] == ["clear", "clear"]
    assert case.peak.tolist() == [-math.inf, -math.inf]
    assert feed(judge, case, [(0.0, 0.0)]) == [case]
    assert case.verdicts[1].score == 9.0


def test_a_bad_number_is_a_breach_and_stops(guard: Guard) -> None:
    for row in ((math.nan, 0.0), (0.0, math.nan), (0.0, math.inf)):
        judge = Judge(guard, Policy.default())
        case = clear_prompt(judge)
        assert feed(judge, case, [row]) == [case]
        assert case.decision.action == "stop"
        bad = [not math.isfinite(number) for number in row]
        assert [verdict.zone == "breach" for verdict in case.verdicts] == bad


def test_a_bad_number_in_the_skipped_head_is_not_read(guard: Guard) -> None:
    judge = Judge(guard, Policy.default())
    case = judge.open("r", PROMPT)
    assert feed(judge, case, [(math.nan, math.nan)] * 2 + [(0.0, 0.0)] * 4) == []
    other = judge.open("r", [9, *PROMPT[1:]])
    assert feed(judge, other, [(0.0, 0.0), (math.nan, 0.0), *[(0.0, 0.0)] * 4]) == [other]


def test_a_zone_never_falls_back(guard: Guard) -> None:
    judge = Judge(guard, Policy.default())
    case = clear_prompt(judge)
    # The peak of a request never falls; a reading that says otherwise is a slot that was lost.
    assert feed(judge, case, [(0.0, 1.5)]) == [case]
    judge.scorer.stream._peak[case.request.slot] = -5.0
    judge.scorer.stream._state[case.request.slot] = -5.0
    assert feed(judge, case, [(0.0, 0.0)]) == []
    assert [verdict.zone for verdict in case.verdicts] == ["clear", "suspect"]
    assert case.decision.action == "flag"


def test_a_decision_only_becomes_stricter(guard: Guard) -> None:
    seen: list[str] = []
    judge = Judge(guard, Policy.default(), on_decision=lambda case: seen.append(case.decision.action))
    case = clear_prompt(judge)
    assert [bool(feed(judge, case, [(0.0, top)])) for top in (0.5, 1.2, 1.4, 2.5, 3.0, 0.0)] == [
        False, True, False, True, False, False,
    ]  # fmt: skip
    assert seen == ["flag", "stop"]
    assert case.decision.verdict is not None
    assert (case.decision.verdict.detector, case.decision.verdict.score) == ("top", 2.5)


def test_the_shadow_policy_sees_everything_and_does_nothing(guard: Guard) -> None:
    seen: list[Case] = []
    judge = Judge(guard, Policy.shadow(), on_decision=seen.append)
    case = clear_prompt(judge)
    assert feed(judge, case, [(5.0, 5.0)]) == []
    assert feed(judge, case, [(math.nan, math.nan)], first=12) == []
    assert [verdict.zone for verdict in case.verdicts] == ["breach", "breach"]
    assert case.coverage.missing == 5
    assert (case.decision.action, seen) == ("observe", [])


@pytest.mark.parametrize("action", ["stop", "flag", "observe"])
def test_a_hole_asks_for_on_missing_even_where_all_is_clear(guard: Guard, action: Any) -> None:
    judge = Judge(guard, Policy(rules=(), on_missing=action))
    case = clear_prompt(judge)
    assert bool(feed(judge, case, [(0.0, 0.0)], first=8)) == (action != "observe")
    assert case.decision.action == action
    assert [verdict.zone for verdict in case.verdicts] == ["clear", "clear"]
    assert (case.coverage.missing, case.coverage.complete) == (2, False)


def test_a_hole_that_begins_the_prompt_counts(guard: Guard) -> None:
    judge = Judge(guard, Policy.default())
    case = judge.open("r", PROMPT)
    feed(judge, case, [(0.0, 0.0)] * 2, first=4)
    assert (case.decision.action, case.coverage.missing) == ("stop", 4)
    assert "has not seen 4 tokens" in case.decision.reason


def test_requests_do_not_share_anything(guard: Guard) -> None:
    judge = Judge(guard, Policy.default())
    cases = [judge.open(str(index), PROMPT) for index in range(40)]
    rows = np.arange(6)
    logits = torch.zeros(240, 2)
    logits[17 * 6 + 3, 1] = 7.0
    judge.step(logits, [RequestRows(case.request, rows + 6 * index, rows) for index, case in enumerate(cases)])
    assert judge.decide(judge.read(cases)) == [cases[17]]
    assert {case.decision.action for case in cases if case is not cases[17]} == {"observe"}
    assert judge.decide(judge.read([])) == []


def test_history_holds_the_first_detector(guard: Guard) -> None:
    judge = Judge(guard, Policy.shadow(), keep_history=True)
    case = judge.open("r", PROMPT)
    feed(judge, case, [(1.0, 9.0)] * 6)
    feed(judge, case, [(6.0, 9.0)])
    assert case.history == [(5, 1.0), (6, 2.0)]


def test_the_audit_log_tells_the_story(guard: Guard, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, include_text=True) as log:
        judge = Judge(guard, Policy.default(), log)
        case = judge.open("r7", PROMPT, principal="acme", text="hello")
        feed(judge, case, [(0.0, 0.0)] * 6)
        feed(judge, case, [(0.0, 1.5)])
        feed(judge, case, [(0.0, math.nan)])
        judge.close(case)
    events = [AuditEvent.model_validate_json(line) for line in path.read_text().splitlines()]
    told = [(event.event, event.zone, event.action, event.position) for event in events]
    assert told == [
        ("open", None, None, -1),
        ("verdict", "suspect", "flag", 6),
        ("action", "suspect", "flag", 6),
        ("verdict", "breach", "stop", 7),
        ("action", "breach", "stop", 7),
        ("close", None, None, 7),
    ]
    assert {(event.request, event.principal, event.guard) for event in events} == {("r7", "acme", guard.digest)}
    assert [event.text for event in events] == ["hello", *[None] * 5]
    assert (events[1].detector, events[1].score, events[1].threshold) == ("top", 1.5, 2.0)
    assert math.isnan(events[3].score or 0.0)
    assert case.verdicts[1].zone == "breach"


def test_what_cannot_be_logged_leaves_no_slot_behind(guard: Guard, tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    judge = Judge(guard, Policy.default(), log)
    case = judge.open("r", PROMPT)
    log.close()
    free = len(judge.scorer.stream._free)
    with pytest.raises(ValueError, match="closed"):
        judge.open("s", PROMPT)
    assert len(judge.scorer.stream._free) == free
    with pytest.raises(ValueError, match="closed"):
        judge.close(case)
    assert len(judge.scorer.stream._free) == free + 1


def test_an_exempt_principal_is_recorded_as_what_it_is_and_never_acted_on(guard: Guard, tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl") as log:
        judge = Judge(guard, Policy.default(), log, exempt=("red-team",))
        for principal, action in (("red-team", "observe"), ("red-teams", "stop"), (None, "stop")):
            case = judge.open(str(principal), PROMPT, principal)
            assert bool(feed(judge, case, [(3.0, 3.0)] * len(PROMPT))) == (action == "stop")
            assert (case.decision.action, case.verdicts[0].zone) == (action, "breach")
        hole = judge.open("hole", PROMPT, "red-team")
        assert not feed(judge, hole, [(0.0, 0.0)] * 3, first=3)
        assert (hole.decision.action, hole.coverage.missing) == ("observe", 3)
    events = [AuditEvent.model_validate_json(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    first, *_ = [event for event in events if event.event == "verdict"]
    assert (first.principal, first.zone, first.score, first.action) == ("red-team", "breach", 3.0, "observe")
    assert first.reason is not None
    assert first.reason.endswith("says stop, but its principal is exempt: nothing is done about it")
    assert [event.principal for event in events if event.event == "action"] == ["red-teams", None]

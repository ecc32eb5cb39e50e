"""The cascade: which step decides, and that none that fails opens the gate."""

from typing import Any

import pytest
import torch

from spider_sense.config import parse
from spider_sense.screening.artifact import Artifact
from spider_sense.screening.cascade import Cascade, StagesSettings
from spider_sense.screening.sensed import Sensed
from spider_sense.screening.stage import STAGES
from spider_sense.screening.tool_policy import ToolPolicy
from spider_sense.screening.tool_rules import ToolRules
from spider_sense.screening.verdict import Answer, Match
from spider_sense.types import Coverage, Verdict

ATTACK = Match("exfil", "injection", 0.9, 0.2)
LOOK_ALIKE = Match("newsletter", "benign", 0.95, 0.2)
POOLED = (1.0, 0.0)


@pytest.mark.parametrize(
    ("zone", "matches", "outcome", "by", "asked"),
    [
        ("clear", (), "accept", "probe", 0),
        ("clear", (LOOK_ALIKE,), "accept", "probe", 0),
        ("clear", (ATTACK,), "accept", "judge", 1),
        ("suspect", (), "accept", "judge", 1),
        ("suspect", (LOOK_ALIKE,), "accept", "signature", 0),
        ("suspect", (ATTACK,), "sanitise", "signature", 0),
        ("suspect", (LOOK_ALIKE, ATTACK), "sanitise", "signature", 0),
        ("breach", (), "sanitise", "probe", 0),
        ("breach", (LOOK_ALIKE,), "sanitise", "probe", 0),
    ],
)
def test_the_table(tools: Any, zone: Any, matches: Any, outcome: str, by: str, asked: int) -> None:
    judge = tools.FixedJudge("accept")
    found = Cascade(matcher=tools.FixedMatcher(matches), judge=judge).decide(
        tools.artifact(), tools.sensed(zone, pooled=POOLED)
    )
    assert (found.outcome, found.decided_by, len(judge.asked)) == (outcome, by, asked)
    assert found.zone == zone
    assert found.seconds > 0


def test_evidence_names_what_decided(tools: Any) -> None:
    cascade = Cascade(matcher=tools.FixedMatcher([ATTACK]), judge=tools.FixedJudge("reject"))
    convicted = cascade.decide(tools.artifact(text="SECRET"), tools.sensed("suspect", pooled=POOLED))
    assert convicted.evidence == "drift suspect, and signature exfil (injection) fires: distance 0.10, radius 0.20"
    judged = cascade.decide(tools.artifact(text="SECRET"), tools.sensed("clear", pooled=POOLED))
    assert judged.evidence == f"all probes are clear, but {convicted.evidence[19:]}; the judge says reject"
    assert "SECRET" not in convicted.evidence + judged.evidence


@pytest.mark.parametrize("outcome", ["accept", "reject"])
def test_a_judge_that_quotes_is_quoted_in_its_answer_alone(tools: Any, outcome: Any) -> None:
    class Quoting:
        def ask(self, artifact: Artifact) -> Answer:
            return Answer(outcome=outcome, reason=f"it says {artifact.text}", seconds=0.0)

    found = Cascade(judge=Quoting()).decide(tools.artifact(text="SECRET"), tools.sensed("suspect"))
    assert found.evidence == f"drift suspect; the judge says {outcome}"
    assert found.answer is not None
    assert found.answer.reason == "it says SECRET"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("judge", ["none", "failing"])
def test_a_judge_that_fails(tools: Any, stage: Any, judge: str) -> None:
    failing = None if judge == "none" else tools.FixedJudge(None)
    found = Cascade(judge=failing).decide(tools.artifact(stage), tools.sensed("suspect"))
    expected = {"query": ("accept", True), "plan": ("accept", True)}.get(
        stage, ("sanitise" if stage == "observation" else "reject", False)
    )
    assert (found.outcome, found.flagged) == expected
    assert {"none": "there is no judge", "failing": "the judge failed: because"}[judge] in found.evidence
    assert found.decided_by == "on_failure"
    assert (found.answer is None) is (judge == "none")


def test_failure_modes_are_settings(tools: Any) -> None:
    for mode, expected in {"allow": ("accept", False), "flag": ("accept", True), "stop": ("reject", False)}.items():
        stages = parse({"action": {"on_failure": mode}}, StagesSettings, "test")
        found = Cascade(stages, judge=tools.FixedJudge(None)).decide(tools.artifact("action"), tools.sensed("suspect"))
        assert (found.outcome, found.flagged) == expected


def test_missing_evidence_is_a_suspicion(tools: Any) -> None:
    judge = tools.FixedJudge("accept")
    cascade = Cascade(matcher=tools.FixedMatcher([LOOK_ALIKE]), judge=judge)
    pooled = torch.tensor(POOLED)
    half = Verdict("drift", 0.0, 1.0, "clear", 3, Coverage(scored=3, missing=2))
    for verdicts in ((), (half,)):
        found = cascade.decide(tools.artifact(), Sensed(verdicts=verdicts, pooled_D=pooled))
        # No look-alike excuses what nobody has seen.
        assert (found.zone, found.decided_by) == ("suspect", "judge")
    assert len(judge.asked) == 2


def test_activations_that_are_not_finite(tools: Any) -> None:
    found = Cascade(judge=tools.FixedJudge("accept")).decide(
        tools.artifact(), tools.sensed("clear", pooled=(float("nan"), 0.0))
    )
    assert (found.outcome, found.evidence) == ("sanitise", "its activations are not finite")


def test_a_call_cannot_be_sanitised(tools: Any) -> None:
    found = Cascade(judge=tools.FixedJudge("sanitise")).decide(tools.artifact("action"), tools.sensed("suspect"))
    assert found.outcome == "reject"


def test_a_call_that_cannot_be_read_is_rejected(tools: Any) -> None:
    artifact = tools.artifact("observation")
    span = type(artifact.span)(stage="action", start=0, stop=1, role="assistant", tool="pay", arguments=None)
    unread = type(artifact)(span=span, text="{")
    found = Cascade(judge=tools.FixedJudge("accept")).decide(unread, tools.sensed("clear"))
    assert (found.outcome, found.decided_by) == ("reject", "rule")


def ruled(tools: Any, zone: Any, judge: Any, **rule: Any) -> Any:
    pytest.importorskip("cedarpy")
    policy = parse({"rules": [{"tool": "search", "then": "allow"}, {"tool": "search", **rule}]}, ToolPolicy, "test")
    cascade = Cascade(judge=judge, rules=ToolRules(policy))
    return cascade.decide(tools.artifact("action"), tools.sensed(zone))


def test_rules_and_the_judge(tools: Any) -> None:
    judge = tools.FixedJudge("accept")
    assert ruled(tools, "clear", judge, then="deny").outcome == "reject"
    assert not judge.asked
    checked = ruled(tools, "clear", judge, then="check")
    assert (checked.outcome, checked.decided_by, len(judge.asked)) == ("accept", "judge", 1)
    asked = ruled(tools, "clear", judge, then="ask")
    assert (asked.outcome, asked.decided_by, asked.needs_human) == ("reject", "rule", True)
    assert asked.evidence == "rule 2 (search) wants a person's word; else: all probes are clear"
    rejected = ruled(tools, "suspect", tools.FixedJudge("reject"), then="ask")
    assert (rejected.decided_by, rejected.needs_human) == ("judge", False)
    # A judge lifts no rule.
    assert ruled(tools, "suspect", judge, then="deny", zones=["suspect"]).decided_by == "rule"


def test_always_judged(tools: Any) -> None:
    judge = tools.FixedJudge("reject")
    stages = parse({"query": {"always_judge": True}}, StagesSettings, "test")
    found = Cascade(stages, judge=judge).decide(tools.artifact("query"), tools.sensed("clear"))
    assert (found.outcome, found.decided_by) == ("reject", "judge")

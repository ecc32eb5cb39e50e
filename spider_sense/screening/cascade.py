"""The cascade: probe, nearest signature, rules, judge. Each step is reached only by what the one before left open.

| sensed  | attack's signature fires | look-alike fires (no attack's does) | neither        |
|---------|--------------------------|-------------------------------------|----------------|
| breach  | breach                   | breach                              | breach         |
| suspect | breach                   | accept                              | ask the judge  |
| clear   | ask the judge            | accept                              | accept         |

Two witnesses convict, one is heard by the judge. A tool call passes the operator's rules as well. A judge that fails
is answered by the stage's own mode, and a judge can lift a suspicion but no breach and no rule.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field

from spider_sense.config import Settings
from spider_sense.screening.artifact import Artifact
from spider_sense.screening.protocols import Judge, Matcher
from spider_sense.screening.sensed import Sensed
from spider_sense.screening.stage import Stage
from spider_sense.screening.tool_rules import Ruling, ToolRules
from spider_sense.screening.verdict import Answer, Decider, Match, Outcome, StageVerdict

__all__ = ["Cascade", "StageSettings", "StagesSettings"]

OnFailure = Literal["allow", "flag", "stop"]
"""What a judge that fails means: accept; accept and flag; treat as a breach."""


class StageSettings(Settings):
    """What one stage does."""

    on_breach: Literal["sanitise", "reject"] = "reject"
    on_failure: OnFailure = "stop"
    always_judge: bool = False
    """Ask the judge about every span of the stage, whatever was sensed."""


class StagesSettings(Settings):
    """What each stage does."""

    query: StageSettings = StageSettings(on_failure="flag")
    plan: StageSettings = StageSettings(on_failure="flag")
    action: StageSettings = StageSettings()
    observation: StageSettings = Field(default=StageSettings(on_breach="sanitise"))


@dataclass(frozen=True, slots=True)
class _Before:
    """What is known of an artifact when the judge might be asked."""

    artifact: Artifact
    sensed: Sensed
    attack: Match | None
    look_alike: Match | None
    ruling: Ruling

    def verdict(
        self, outcome: Outcome, by: Decider, evidence: str, answer: Answer | None = None, flagged: bool = False
    ) -> StageVerdict:
        if outcome == "sanitise" and self.artifact.stage == "action":
            outcome = "reject"  # there is nothing in a call that a notice could replace
        return StageVerdict(
            artifact=self.artifact,
            zone=self.sensed.zone,
            outcome=outcome,
            decided_by=by,
            evidence=evidence,
            verdicts=self.sensed.verdicts,
            match=self.attack or self.look_alike,
            answer=answer,
            flagged=flagged,
        )


class Cascade:
    """Decides on one artifact at a time.

    Args:
        stages: what each stage does.
        matcher: signatures; None has none.
        judge: whom suspects go to; None is a judge that always fails.
        rules: what the operator says of tools; None says nothing.
    """

    def __init__(
        self,
        stages: StagesSettings | None = None,
        matcher: Matcher | None = None,
        judge: Judge | None = None,
        rules: ToolRules | None = None,
    ) -> None:
        stages = stages or StagesSettings()
        self._stages: Mapping[Stage, StageSettings] = {
            "query": stages.query,
            "plan": stages.plan,
            "action": stages.action,
            "observation": stages.observation,
        }
        self._matcher, self._judge, self._rules = matcher, judge, rules

    def decide(self, artifact: Artifact, sensed: Sensed) -> StageVerdict:
        """Decide on one artifact.

        Args:
            artifact: what it is.
            sensed: what the model's activations say of it.
        """
        start = time.perf_counter()
        verdict = self._decide(artifact, sensed)
        return replace(verdict, seconds=time.perf_counter() - start)

    def _decide(self, artifact: Artifact, sensed: Sensed) -> StageVerdict:
        matches = self._matches(sensed)
        attack = next((match for match in matches if match.kind != "benign"), None)
        look_alike = next((match for match in matches if match.kind == "benign"), None)
        before = _Before(artifact, sensed, attack, look_alike, Ruling())
        convicted = self._convicted(before)
        if convicted is not None:
            return convicted
        if artifact.stage == "action" and self._rules is not None:
            before = replace(before, ruling=self._ruling(self._rules, before))
            if before.ruling.deny is not None:
                return before.verdict("reject", "rule", before.ruling.deny)
        return self._attended(before, self._judged(before))

    def _matches(self, sensed: Sensed) -> list[Match]:
        if self._matcher is None or sensed.pooled_D is None:
            return []
        return list(self._matcher.match(sensed.pooled_D))

    def _convicted(self, before: _Before) -> StageVerdict | None:
        artifact, sensed, on_breach = before.artifact, before.sensed, self._stages[before.artifact.stage].on_breach
        if artifact.stage == "action" and (artifact.span.tool is None or artifact.span.arguments is None):
            return before.verdict("reject", "rule", "the tool or its arguments cannot be read")
        if sensed.pooled_D is not None and not bool(torch.isfinite(sensed.pooled_D).all()):
            return before.verdict(on_breach, "probe", "its activations are not finite")
        if sensed.zone == "breach":
            assert sensed.strictest is not None
            return before.verdict(on_breach, "probe", f"{sensed.strictest.detector} breach")
        if sensed.zone == "suspect" and before.attack is not None:
            return before.verdict(on_breach, "signature", f"{_suspicion(sensed)}, and {_near(before.attack)}")
        return None

    @staticmethod
    def _ruling(rules: ToolRules, before: _Before) -> Ruling:
        artifact = before.artifact
        assert artifact.span.tool is not None
        assert artifact.span.arguments is not None
        kind = before.attack.kind if before.attack else ""
        return rules.decide(artifact.principal, artifact.span.tool, artifact.span.arguments, before.sensed.zone, kind)

    def _judged(self, before: _Before) -> StageVerdict:
        """Return what the probes, the signature or the judge say, but for a breach and a rule."""
        reason = self._reason_to_ask(before)
        if reason is not None:
            return self._asked(before, reason)
        if before.sensed.zone == "clear":
            return before.verdict("accept", "probe", "all probes are clear")
        assert before.look_alike is not None
        return before.verdict("accept", "signature", f"{_suspicion(before.sensed)}, but {_near(before.look_alike)}")

    def _reason_to_ask(self, before: _Before) -> str | None:
        sensed = before.sensed
        if before.ruling.check is not None:
            return f"{before.ruling.check} wants it checked"
        if self._stages[before.artifact.stage].always_judge:
            return f"every {before.artifact.stage} is judged"
        if before.attack is not None:
            return f"all probes are clear, but {_near(before.attack)}"
        # A look-alike excuses what a probe suspects, not what no probe has seen in full.
        excused = before.look_alike is not None and sensed.seen
        return None if sensed.zone == "clear" or excused else _suspicion(sensed)

    def _asked(self, before: _Before, why: str) -> StageVerdict:
        answer = None if self._judge is None else self._judge.ask(before.artifact)
        stage = self._stages[before.artifact.stage]
        if answer is not None and answer.outcome is not None:
            return before.verdict(answer.outcome, "judge", f"{why}; the judge says {answer.outcome}", answer)
        failed = "there is no judge" if answer is None else f"the judge failed: {answer.reason}"
        evidence = f"{why}; {failed}; on_failure says {stage.on_failure}"
        outcome: Outcome = stage.on_breach if stage.on_failure == "stop" else "accept"
        return before.verdict(outcome, "on_failure", evidence, answer, flagged=stage.on_failure == "flag")

    @staticmethod
    def _attended(before: _Before, verdict: StageVerdict) -> StageVerdict:
        if before.ruling.ask is None or verdict.outcome != "accept":
            return verdict
        evidence = f"{before.ruling.ask} wants a person's word; else: {verdict.evidence}"
        return replace(verdict, outcome="reject", decided_by="rule", evidence=evidence, needs_human=True)


def _suspicion(sensed: Sensed) -> str:
    if sensed.strictest is None:
        return "no probe has read it"
    if sensed.strictest.zone == "clear":
        return "the probes have not seen it in full"
    return f"{sensed.strictest.detector} suspect"


def _near(match: Match) -> str:
    return f"signature {match.id} ({match.kind}) fires: distance {1 - match.cosine:.2f}, radius {match.radius:.2f}"

"""The policy: what is done about the verdicts on a request.

A policy is a list of rules, (detector, zone) -> action, and what to do about whoever mines the model, read from YAML::

    rules:
      - {detector: misuse, zone: breach, action: stop}
      - {detector: "*", zone: suspect, action: flag}
    on_missing: stop
    refusal: "I can't help with that."
    steer: {vector: refusal, strength: 4.0}   # only where a rule says steer
    patch: {folder: patch/, alpha: 1.0, begin: prompt}   # only where a rule says patch
    throttle: {requests: 6, per_seconds: 60, for_seconds: 600}
    extraction: {watch: flag, limit: throttle, act: stop, on_unknown: stop}   # only where extraction is watched for

It fails closed: a breach that no rule names is stopped, and so is a request that was not seen in full.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, FiniteFloat, PositiveInt, model_validator

from spider_sense.config import Settings
from spider_sense.decision import SEVERITY, Decision
from spider_sense.errors import ConfigError, nearest
from spider_sense.extraction.standing import Standing
from spider_sense.types import Action, Verdict

__all__ = ["Extraction", "Patch", "Policy", "Rule", "Steer", "Throttle"]

ANY = "*"


class Rule(Settings):
    """One line of a policy."""

    detector: str = Field(min_length=1)
    """Name of a detector of the guard, or ``*`` for all of them."""
    zone: Literal["suspect", "breach"]
    action: Action

    def matches(self, verdict: Verdict) -> bool:
        """Whether the rule speaks of this verdict."""
        return self.detector in (ANY, verdict.detector) and self.zone == verdict.zone


class Steer(Settings):
    """What the action ``steer`` adds to the residual stream."""

    vector: str = Field(min_length=1)
    """Name of a vector of the guard."""
    strength: FiniteFloat
    """Multiple of the vector as the guard stores it."""


class Patch(Settings):
    """What the action ``patch`` switches on: a neuron patch, for the request alone."""

    folder: Path | None = None
    """Where the patch lies, relative to the working directory as in every YAML file; None: the engine is handed one."""
    alpha: FiniteFloat | None = None
    """Strength; None: the one that the patch is meant for."""
    begin: Literal["token", "prompt"] = "token"
    """Where it begins. ``token``: with the next token that is computed; whether an answer refuses is decided by then.
    ``prompt``: the prompt of a request without a token of an answer is read once more, patched from its first token on;
    later in an answer the patch begins with the next token too. Verdicts on prompts are awaited for it, whatever
    ``same_step`` says."""


class Throttle(Settings):
    """What the action ``throttle`` does to whoever sent the request: the next ones are slowed, this one goes on."""

    requests: PositiveInt = 6
    """How many are let in."""
    per_seconds: PositiveInt = 60
    """In any so many seconds."""
    for_seconds: PositiveInt = 600
    """How long this lasts; it begins anew with every request that is throttled."""


class Extraction(Settings):
    """What is done about a request because of how its principal stands; see ``spider_sense.extraction``."""

    watch: Action = "flag"
    """A reason to look closer."""
    limit: Action
    """One tier of the detector found extraction, at its bounded rate of false alarms."""
    act: Action
    """Several kinds of evidence did, or a selection under false-discovery control."""
    on_unknown: Action = "stop"
    """What is done while nothing can be told of a principal: the feed is down, or a request of it was lost."""
    reasoning_seconds: PositiveInt = 3600
    """How long ``omit_reasoning`` lasts; it begins anew with every request that asks for it."""


class Policy(Settings):
    """An ordered list of rules and what else acting needs."""

    rules: tuple[Rule, ...]
    """For each verdict the first rule that matches counts."""
    on_missing: Action = "stop"
    """What is done when a verdict's coverage has a hole, or there is no verdict at all."""
    refusal: str = "I can't help with that."
    """The text that a stopped request ends with."""
    steer: Steer | None = None
    patch: Patch | None = None
    throttle: Throttle = Throttle()
    extraction: Extraction | None = None
    """None where nothing watches for extraction."""
    same_step: bool = False
    """Whether the verdict is awaited in the step that scores it, so that not one token follows a breach. Otherwise it
    is read at the next step boundary, one token later, and no step waits for it."""

    @model_validator(mode="after")
    def _actions_are_defined(self) -> Self:
        if self.steer is None:
            self._refuse("steer", "a vector; add a section steer: {vector: NAME, strength: 4.0}")
        if self.patch is None:
            self._refuse("patch", "a patch; add a section patch: {folder: FOLDER}, as `nest tune` writes it")
        if self.extraction is None:
            self._refuse("omit_reasoning", "a section extraction, which says how long it lasts")
        return self

    def _refuse(self, action: Action, needs: str) -> None:
        asked = [place for place, wanted in self._wanted() if wanted == action]
        if asked:
            raise ValueError(f"{', '.join(asked)}: {action!r} needs {needs}")

    def _wanted(self) -> Iterator[tuple[str, Action]]:
        """Yield every place that names an action, and the action."""
        yield from ((f"rules.{index}.action", rule.action) for index, rule in enumerate(self.rules))
        yield "on_missing", self.on_missing
        if self.extraction is not None:
            for level in ("watch", "limit", "act", "on_unknown"):
                yield f"extraction.{level}", getattr(self.extraction, level)

    @property
    def digest(self) -> str:
        """Short name of this policy, as a guard has one."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def actions(self) -> tuple[Action, ...]:
        """Every action that it may decide on, mildest first: what it asks for, and what it falls back on."""
        asked = {"observe", "flag", "stop", *(action for _, action in self._wanted())}
        return tuple(action for action in SEVERITY if action in asked)

    def check_engine(self, engine: str, can: Collection[Action], detectors: Collection[str]) -> None:
        """Check that an engine can do what the policy asks for, and that a guard has the detectors it names.

        Args:
            engine: what to call it.
            can: its actions.
            detectors: names of the guard's detectors.

        Raises:
            ConfigError: naming the rule, what it asks for and what there is.
        """
        for place, action in self._wanted():
            if action not in can:
                raise ConfigError(f"{place}: {engine} cannot {action!r}; it can: {', '.join(can)}")
        for rule in self.rules:
            if rule.detector not in (ANY, *detectors):
                raise ConfigError(
                    f"the policy speaks of detector {rule.detector!r}; {nearest(rule.detector, detectors)}"
                )

    @property
    def reads_again(self) -> bool:
        """Whether a prompt is read once more, under the patch, where its verdict asks for that."""
        return "patch" in self.actions and self.patch is not None and self.patch.begin == "prompt"

    def check_watched(self, watched: bool) -> None:
        """Check that it says what to do about extraction if that is watched for, and only then.

        Raises:
            ConfigError: if not.
        """
        if self.extraction is not None and not watched:
            raise ConfigError(
                "the policy has a section extraction, and nothing watches for it; say where its detector and its store "
                "are, or take the section out"
            )
        if self.extraction is None and watched:
            raise ConfigError(
                "extraction is watched for, and the policy does not say what to do about it; add a section such as "
                "extraction: {limit: throttle, act: stop}"
            )

    @classmethod
    def default(cls) -> Self:
        """Return the policy that stops a breach and flags a suspect."""
        return cls(rules=_for_all_detectors(breach="stop", suspect="flag"))

    @classmethod
    def shadow(cls) -> Self:
        """Return the policy that scores everything and acts on nothing, not even on a hole in the coverage."""
        return cls(rules=_for_all_detectors(breach="observe", suspect="observe"), on_missing="observe")

    def decide(self, verdicts: Sequence[Verdict], standing: Standing | None = None) -> Decision:
        """Weigh the verdicts on one request, and how its principal stands.

        Args:
            verdicts: one a detector, of the same request at the same position.
            standing: of the principal; None where nothing watches for extraction.

        Returns:
            The strictest action that is asked for; of equally strict ones the first.
        """
        if not verdicts:
            return Decision(
                action=self.on_missing, verdict=None, reason=f"no verdict at all: on_missing says {self.on_missing}"
            )
        asked = [decision for verdict in verdicts for decision in self._asked(verdict)]
        if standing is not None and self.extraction is not None and standing.level != "clear":
            asked.append(self._by_standing(standing, self.extraction))
        clear = Decision(action="observe", verdict=None, reason="all detectors are clear")
        return max(asked, key=lambda decision: decision.severity, default=clear)

    def _asked(self, verdict: Verdict) -> Iterator[Decision]:
        if verdict.zone != "clear":
            yield self._by_rule(verdict)
        if verdict.coverage.missing > 0:
            hole = f"{verdict.detector} has not seen {verdict.coverage.missing} tokens"
            reason = f"{hole}: on_missing says {self.on_missing}"
            yield Decision(action=self.on_missing, verdict=verdict, reason=reason)

    def _by_standing(self, standing: Standing, section: Extraction) -> Decision:
        name = "on_unknown" if standing.level == "unknown" else standing.level
        action: Action = getattr(section, name)
        reason = f"extraction {standing.level} ({standing.reason}): extraction.{name} says {action}"
        return Decision(action=action, verdict=None, reason=reason, secret=True)

    def _by_rule(self, verdict: Verdict) -> Decision:
        event = f"{verdict.detector} {verdict.zone}"
        for number, rule in enumerate(self.rules, start=1):
            if rule.matches(verdict):
                reason = f"{event}: rule {number} ({rule.detector}, {rule.zone}) says {rule.action}"
                return Decision(action=rule.action, verdict=verdict, reason=reason)
        if verdict.zone == "breach":
            return Decision(action="stop", verdict=verdict, reason=f"{event}: no rule matches, fails closed with stop")
        return Decision(action="flag", verdict=verdict, reason=f"{event}: no rule matches, flag")


def _for_all_detectors(*, breach: Action, suspect: Action) -> tuple[Rule, ...]:
    return (
        Rule(detector=ANY, zone="breach", action=breach),
        Rule(detector=ANY, zone="suspect", action=suspect),
    )

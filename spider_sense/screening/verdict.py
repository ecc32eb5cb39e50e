"""What screening says of each stage and of a conversation."""

from dataclasses import dataclass
from typing import Literal, get_args

from spider_sense.screening.artifact import Artifact
from spider_sense.screening.stage import Stage
from spider_sense.types import Verdict, Zone

__all__ = ["OUTCOMES", "Answer", "Decider", "Match", "Outcome", "Screening", "StageVerdict"]

Outcome = Literal["accept", "sanitise", "reject"]
"""sanitise: the span is replaced by a neutral notice, and the conversation goes on."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""From mildest to strictest."""

Decider = Literal["probe", "signature", "judge", "on_failure", "rule", "envelope", "leak"]
"""What decided; on_failure: the stage's setting, because there is no judge or it failed."""


@dataclass(frozen=True, slots=True)
class Match:
    """A signature near a span."""

    id: str
    kind: str
    cosine: float
    radius: float
    """Cosine distance up to which the signature fires."""

    @property
    def fires(self) -> bool:
        """Whether the span lies within the radius."""
        return self.cosine >= 1 - self.radius


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of asking a judge."""

    outcome: Outcome | None
    """None if it failed: it was late, could not be reached, or did not answer as asked."""
    reason: str
    """The judge's words, at most a few hundred characters, which may quote the screened text; or what failed."""
    seconds: float
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageVerdict:
    """The decision on one artifact."""

    artifact: Artifact
    zone: Zone
    """What was sensed: the strictest zone of the probes."""
    outcome: Outcome
    decided_by: Decider
    evidence: str
    """In words: the probe, signature, rule, judge, or the secret and its owner. Never the screened text."""
    verdicts: tuple[Verdict, ...] = ()
    match: Match | None = None
    answer: Answer | None = None
    """The judge's; None if it was not asked, or there is none."""
    flagged: bool = False
    """Whether a person should look at it though it was accepted."""
    needs_human: bool = False
    """Whether the runtime may still go on if a person says so; until then ``outcome`` holds."""
    seconds: float = 0.0
    """What screening cost after the activations were there, judge included."""

    @property
    def stage(self) -> Stage:
        """The artifact's stage."""
        return self.artifact.stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """The decisions on a conversation, one for each span."""

    verdicts: tuple[StageVerdict, ...]

    @property
    def outcome(self) -> Outcome:
        """The strictest."""
        return max((verdict.outcome for verdict in self.verdicts), key=OUTCOMES.index, default="accept")

    @property
    def raised(self) -> tuple[StageVerdict, ...]:
        """Verdicts that are not a plain acceptance."""
        return tuple(verdict for verdict in self.verdicts if verdict.outcome != "accept" or verdict.flagged)

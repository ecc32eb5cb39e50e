"""What is decided about a request, and how strict that is."""

from dataclasses import dataclass

from spider_sense.types import Action, Verdict

__all__ = ["SEVERITY", "Decision"]

SEVERITY: tuple[Action, ...] = (
    "observe",
    "flag",
    "throttle",
    "omit_reasoning",
    "verify",
    "escalate",
    "patch",
    "steer",
    "stop",
)
"""All actions, from mildest to strictest: where several are asked for, the strictest is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to be done about one request."""

    action: Action
    verdict: Verdict | None
    """The verdict that asked for the action; None if all are clear or there is none."""
    reason: str
    """Names the detector and the rule, never the score: an untrusted client may read it."""
    secret: bool = False
    """Whether it is because of the principal's standing, of which a client learns nothing but what is done."""

    @property
    def severity(self) -> int:
        """Place of its action in ``SEVERITY``."""
        return SEVERITY.index(self.action)

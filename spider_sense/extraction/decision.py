"""What the detector says of a principal."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["LEVELS", "TIERS", "Decision", "Level", "Tier"]

Level = Literal["watch", "limit", "act"]
"""watch: look closer, nothing is done. limit: a tier crossed its threshold, own history with a high level besides, so
throttle, verify or omit reasoning. act: several kinds of evidence, or a selection of those limited under
false-discovery control; a human confirms."""
LEVELS: tuple[Level, ...] = get_args(Level)

Tier = Literal["rule", "own", "level", "group"]
"""rule: a deterministic rule. own: change against the principal's own history. level: against a calibrated population.
group: linked principals together."""
TIERS: tuple[Tier, ...] = get_args(Tier)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One finding. A principal's level is the highest of its findings."""

    principal: str
    level: Level
    tier: Tier
    score: float
    threshold: float
    p_value: float | None
    """Conformal, at principal level; None for a rule."""
    count: int
    """Requests of the principal up to the finding."""
    time: float
    """Of the last request it includes, in seconds since the epoch."""
    stratum: str
    """Calibration stratum that the threshold is of; empty is everybody."""
    certified: bool
    """Whether the stratum holds enough principals that lived as long, for its claim; always True for a rule."""
    evidence: tuple[str, ...]
    """In words, for the human who decides."""
    group: tuple[str, ...] = ()
    """Members of the linked group that the finding is about."""

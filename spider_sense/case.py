"""A request before the judge: its scores, zones and decision so far.

Shape letter: H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from spider_sense.decision import Decision
from spider_sense.extraction.observation import Asked
from spider_sense.extraction.standing import Standing
from spider_sense.scoring import Request
from spider_sense.types import ZONES, Coverage, Verdict

__all__ = ["Case"]


@dataclass(slots=True)
class Case:
    """A request before the judge."""

    request: Request
    thresholds: np.ndarray
    """[2, H] float32: suspect and breach for the request's prompt length."""
    peak: np.ndarray
    """[H] float32, each head's maximum over time as last read; -inf before the end of the prompt."""
    zone: np.ndarray
    """[H] int8; a zone never falls back."""
    decision: Decision
    """The strictest decision so far."""
    position: int = -1
    """Last token that ``peak`` includes."""
    counts: tuple[int, int, int] = (0, 0, 0)
    """Tokens that were scored, cached and missing until then."""
    closed: bool = False
    """Whether it has ended."""
    missing: int = 0
    """Tokens known to be missing when it was last judged."""
    detectors: tuple[str, ...] = ()
    stopped_after: int | None = None
    """Tokens that were generated before the request was stopped; None if it was not."""
    patched_from: int | None = None
    """Absolute position of the first token that passed through the model under the patch, which stays on from there;
    the token after it is the first that can come out differently. 0 if the prompt was read again under it; it is scored
    by its first reading. None if the patch never came on."""
    steered_from: int | None = None
    """The same of steering."""
    prompt: Sequence[int] = ()
    """Token ids, for whoever watches for extraction."""
    asked: Asked | None = None
    """How it was asked for, where an engine can tell."""
    standing: Standing | None = None
    """How its principal stood when it began; None if there is nothing to say, and once it was weighed."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """(position, readout of the first detector) at each step; filled only by a judge that keeps history."""

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What each detector says so far."""
        return tuple(
            Verdict(name, float(score), float(breach), ZONES[zone], self.position, self.coverage)
            for name, score, breach, zone in zip(self.detectors, self.peak, self.thresholds[1], self.zone, strict=True)
        )

    @property
    def coverage(self) -> Coverage:
        """What the verdicts rest on."""
        return Coverage(*self.counts)

    @property
    def acted_on(self) -> bool:
        """Whether its hidden states are to be changed: patched or steered."""
        return self.decision.action in ("patch", "steer")

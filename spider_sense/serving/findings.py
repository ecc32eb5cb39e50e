"""What a step's scores say, as it travels from the worker that scored to the scheduler that acts and answers.

Shape letters: B requests of a step, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spider_sense.judge import Case
from spider_sense.types import Action, Zone

__all__ = ["Findings", "findings_of"]

_ZONES: tuple[Zone, ...] = ("clear", "suspect", "breach")


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """The state of every request that a step computed rows of. Arrays, since they are pickled each step."""

    ids: tuple[str, ...]
    peak_BH: npt.NDArray[np.float32]
    threshold_BH: npt.NDArray[np.float32]
    """Breach thresholds."""
    zone_BH: npt.NDArray[np.int8]
    coverage_B3: npt.NDArray[np.int64]
    """Tokens scored, cached, missing."""
    actions: tuple[Action, ...]
    reasons: tuple[str, ...]

    @property
    def stops(self) -> dict[str, str]:
        """Requests that are to end with this step, and why; a reason names the detector and the rule, not the score."""
        rows = zip(self.ids, self.actions, self.reasons, strict=True)
        return {name: reason for name, action, reason in rows if action == "stop"}

    def answer(self, row: int, detectors: Sequence[str], guard: str, scores: bool) -> dict[str, Any]:
        """Return what a client may read of one request, JSON-ready.

        Args:
            row: place among ``ids``.
            detectors: names of the heads.
            guard: digest.
            scores: whether to show scores and thresholds; a score is a hill to climb for whoever attacks.
        """
        said: dict[str, Any] = {}
        for head, name in enumerate(detectors):
            said[name] = {"zone": _ZONES[self.zone_BH[row, head]]}
            if scores:
                peak = float(self.peak_BH[row, head])
                said[name] |= {
                    "score": peak if np.isfinite(peak) else str(peak),
                    "threshold": float(self.threshold_BH[row, head]),
                }
        scored, cached, missing = self.coverage_B3[row].tolist()
        return {
            "guard": guard,
            "zone": _ZONES[int(self.zone_BH[row].max(initial=0))],
            "action": self.actions[row],
            "reason": self.reasons[row],
            "detectors": said,
            "coverage": {"scored": scored, "cached": cached, "missing": missing},
        }


def findings_of(cases: Sequence[Case]) -> Findings:
    """Collect what is known of some requests, whose ids are the names that they were opened with."""
    heads = len(cases[0].peak) if cases else 0
    coverage = [[one.scored, one.cached, one.missing] for one in (case.coverage for case in cases)]
    return Findings(
        ids=tuple(case.request.id for case in cases),
        peak_BH=np.array([case.peak for case in cases], dtype=np.float32).reshape(-1, heads),
        threshold_BH=np.array([case.thresholds[1] for case in cases], dtype=np.float32).reshape(-1, heads),
        zone_BH=np.array([case.zone for case in cases], dtype=np.int8).reshape(-1, heads),
        coverage_B3=np.array(coverage, dtype=np.int64).reshape(-1, 3),
        actions=tuple(case.decision.action for case in cases),
        reasons=tuple(case.decision.reason for case in cases),
    )

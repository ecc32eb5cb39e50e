"""What a step's scores say, as it travels from the worker that scored to the scheduler that acts and answers.

Shape letters: B requests of a step, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Required, TypedDict

import numpy as np
import numpy.typing as npt

from spider_sense.case import Case
from spider_sense.extraction.feed_counts import FeedNote
from spider_sense.judge import NOTHING
from spider_sense.types import UNKNOWN, ZONES, Action, Zone

__all__ = ["Ended", "Findings", "Note", "findings_of"]


class Ended(TypedDict):
    """What the metrics hear of a request that has ended, however it did."""

    action: Action
    zones: list[Zone]
    """One a detector."""
    margins: list[float]
    """Peak score less breach threshold of each detector, in logits; -inf of one that had nothing to read yet."""
    coverage: dict[str, int]
    """Tokens scored, cached and missing."""


class Note(TypedDict, total=False):
    """What a step tells the front end, as it travels from the scheduler to the processes that answer clients."""

    seconds: Required[float]
    """That the guard took on the host."""
    ended: Required[list[Ended]]
    throttled: Required[list[str]]
    """Principals whose next requests are to be slowed."""
    hushed: list[str]
    """Principals whose next answers are to be given without reasoning."""
    extraction: FeedNote
    """What became of the requests that the extraction feed was offered."""
    unrecorded: int
    """Events that the audit log did not take."""


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
    patched_from: tuple[int | None, ...]
    """First position that was computed under the patch, None of a request that is not patched, or not yet."""
    patches: dict[str, int] = field(default_factory=dict)
    """Requests that are to be patched from now on, and how many of their tokens were computed by now."""
    seconds: float = 0.0
    """That the guard took on the host for this step."""
    throttled: tuple[str, ...] = ()
    """Principals whose next requests are to be slowed, from this step on."""
    hushed: tuple[str, ...] = ()
    """Principals whose next answers are to be given without reasoning."""
    secret: tuple[bool, ...] = ()
    """Of each request whether it is acted on because of its principal's standing, which a client is not told."""
    extraction: FeedNote | None = None
    unrecorded: int = 0
    """Events that the audit log did not take since the last step."""

    @property
    def stops(self) -> dict[str, str]:
        """Requests that are to end with this step, and why, in words that a client may read."""
        rows = enumerate(zip(self.ids, self.actions, strict=True))
        return {name: self._said(row)["reason"] for row, (name, action) in rows if action == "stop"}

    def answer(self, row: int, detectors: Sequence[str], guard: str, scores: bool) -> dict[str, Any]:
        """Return what a client may read of one request, JSON-ready.

        Args:
            row: place among ``ids``.
            detectors: names of the heads.
            guard: digest.
            scores: whether to show scores and thresholds, and which tokens were cached; a score is a hill to climb for
                whoever attacks, and what is cached of a prompt tells what others have sent.
        """
        said: dict[str, Any] = {}
        for head, name in enumerate(detectors):
            said[name] = {"zone": ZONES[self.zone_BH[row, head]]}
            if scores:
                peak = float(self.peak_BH[row, head])
                said[name] |= {
                    "score": peak if np.isfinite(peak) else str(peak),
                    "threshold": float(self.threshold_BH[row, head]),
                }
        return {
            "guard": guard,
            "zone": ZONES[int(self.zone_BH[row].max(initial=0))],
            **self._said(row),
            "detectors": said,
            "coverage": self._coverage(row) if scores else self._covered(row),
        } | self._patched(row)

    def _patched(self, row: int) -> dict[str, int]:
        start = self.patched_from[row]
        return {} if start is None or self._is_secret(row) else {"patched_from": start}

    def _is_secret(self, row: int) -> bool:
        return row < len(self.secret) and self.secret[row]

    def _said(self, row: int) -> dict[str, str]:
        """Return action and reason, as a client may know them: whoever mines the model learns no more than it sees."""
        if self._is_secret(row):
            stopped = self.actions[row] == "stop"
            return {"action": "stop", "reason": "refused"} if stopped else {"action": "observe", "reason": NOTHING}
        return {"action": self.actions[row], "reason": self.reasons[row]}

    def ended(self, row: int) -> Ended:
        """Return what the metrics hear of one request, by its place among ``ids``."""
        return {
            "action": self.actions[row],
            "zones": [ZONES[zone] for zone in self.zone_BH[row]],
            "margins": (self.peak_BH[row] - self.threshold_BH[row]).tolist(),
            "coverage": self._coverage(row),
        }

    def _coverage(self, row: int) -> dict[str, int]:
        return dict(zip(("scored", "cached", "missing"), self.coverage_B3[row].tolist(), strict=True))

    def _covered(self, row: int) -> dict[str, int]:
        scored, cached, missing = self.coverage_B3[row].tolist()
        return {"scored": scored + cached, "missing": missing}


def findings_of(
    cases: Sequence[Case],
    seconds: float = 0.0,
    stricter: Sequence[Case] = (),
    extraction: FeedNote | None = None,
    unrecorded: int = 0,
) -> Findings:
    """Collect what is known of some requests, whose ids are the names that they were opened with.

    Args:
        cases: the requests.
        seconds: what it took to know.
        stricter: those whose decision has become stricter: their principals may have to be slowed or hushed.
        extraction: what became of what the feed was offered.
        unrecorded: events that the audit log did not take.
    """
    heads = len(cases[0].peak) if cases else 0
    requests = [case.request for case in cases]
    return Findings(
        ids=tuple(request.id for request in requests),
        peak_BH=np.array([case.peak for case in cases], dtype=np.float32).reshape(-1, heads),
        threshold_BH=np.array([case.thresholds[1] for case in cases], dtype=np.float32).reshape(-1, heads),
        zone_BH=np.array([case.zone for case in cases], dtype=np.int8).reshape(-1, heads),
        coverage_B3=np.array([case.counts for case in cases], dtype=np.int64).reshape(-1, 3),
        patches={case.request.id: case.request.computed for case in cases if case.decision.action == "patch"},
        actions=tuple(case.decision.action for case in cases),
        reasons=tuple(case.decision.reason for case in cases),
        patched_from=tuple(case.patched_from for case in cases),
        seconds=seconds,
        throttled=_principals(stricter, "throttle"),
        hushed=_principals(stricter, "omit_reasoning"),
        secret=tuple(case.decision.secret for case in cases),
        extraction=extraction,
        unrecorded=unrecorded,
    )


def _principals(cases: Sequence[Case], action: Action) -> tuple[str, ...]:
    return tuple(case.request.principal or UNKNOWN for case in cases if case.decision.action == action)

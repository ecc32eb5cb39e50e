"""Canaries in a running engine: their scores are taken in the actor's place, and compared with those of the guard.

Shape letters: N prompts, H heads.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spider_sense.canary import Canaries, Canary, Drift
from spider_sense.errors import MismatchError
from spider_sense.guard import Manifest

__all__ = ["CanaryWatch", "check_drift", "report"]

_REQUEST = "spider_sense canary"
"""How the name of a canary's request begins. It proves nothing: clients can choose names that begin so."""


class CanaryWatch:
    """Takes the scores of canaries at the end of their prompts; ends no request and answers nobody.

    Args:
        canaries: what the engine is given, under the names of :attr:`requests`.
    """

    def __init__(self, canaries: Canaries) -> None:
        self._canaries = canaries
        self.requests: Mapping[str, Canary] = {
            f"{_REQUEST} {place}": canary for place, canary in enumerate(canaries.prompts)
        }
        self._peaks: dict[str, np.ndarray] = {}
        self.unrecorded = 0
        """Events that the audit log did not take meanwhile; whose request is not recorded is not scored."""

    def update(self, original: Callable[..., Any], scheduler: Any, step: Any, output: Any) -> Any:
        """Take what a step says; the arguments are those of :meth:`spider_sense.serving.actor.Actor.update`."""
        findings = getattr(output, "spider_sense", None)
        if findings is not None:
            self.unrecorded += findings.unrecorded
            for name, peak_H, coverage in zip(findings.ids, findings.peak_BH, findings.coverage_B3, strict=True):
                self._take(name, peak_H, coverage.tolist())
        return original(step, output)

    def _take(self, name: str, peak_H: np.ndarray, coverage: list[int]) -> None:
        if coverage == [len(self.requests[name].tokens), 0, 0]:
            self._peaks[name] = peak_H
        elif name in self._peaks:
            # What it generates is no part of the comparison, but a tap that is dead while it does is found.
            self._peaks[name] = np.where(np.isnan(peak_H), np.nan, self._peaks[name])

    def drift(self, detectors: tuple[str, ...]) -> Drift:
        """Compare what was found with what the guard says."""
        silent_H = np.full(len(detectors), np.nan)
        found_NH = np.array([self._peaks.get(name, silent_H) for name in self.requests], dtype=np.float64)
        return self._canaries.drift(found_NH, detectors)


def check_drift(drift: Drift, manifest: Manifest, allow_uncertified: bool) -> None:
    """Refuse an engine that does not score as the guard was calibrated.

    Raises:
        MismatchError: if a canary lies beyond its band. Where another dtype or quantisation than the certified one is
            accepted the bands say nothing, and only a score that is not a number is refused.
    """
    if drift.accepted or (allow_uncertified and np.isfinite(drift.difference)):
        return
    raise MismatchError(
        f"this engine does not score as the guard was calibrated: {drift}. Serve the model as it was calibrated "
        f"({'; '.join(config.model_dump_json() for config in manifest.certified)}), or run `spider-sense calibrate`"
    )


def report(drift: Drift | None) -> Mapping[str, Any] | None:
    """Return a drift as JSON; None of a guard without canaries."""
    if drift is None:
        return None
    return {
        "detector": drift.detector,
        "prompt": drift.prompt,
        "difference": drift.difference,
        "band": drift.band,
        "accepted": drift.accepted,
    }

"""The probes of the stages, kept as a guard whose detectors are called after them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from spider_sense.calibration import BucketThresholds, zone
from spider_sense.errors import GuardError, nearest
from spider_sense.guard import KIND, Guard
from spider_sense.screening.drift import DRIFT
from spider_sense.screening.stage import STAGES, Stage
from spider_sense.types import Zone

__all__ = ["DETECTORS", "StageGuard", "reads_stages", "stage_zone"]

DETECTORS = (*STAGES, DRIFT)
"""What the detectors may be called."""


@dataclass(frozen=True, slots=True)
class StageGuard:
    """A guard with a detector for each stage that it knows, and the drift probe of observations.

    It is written, signed and verified like any guard. A stage without a detector is always suspect.

    Raises:
        GuardError: if a detector is not called after a stage.
    """

    guard: Guard

    def __post_init__(self) -> None:
        for record in self.guard.manifest.detectors:
            if record.name not in DETECTORS:
                raise GuardError(
                    f"the detector {record.name!r} is of no stage; {nearest(record.name, DETECTORS)}. "
                    "Probes of the stages are made by `make bench-screening`; a guard of `spider-sense train` is for "
                    "whole requests"
                )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read the probes of a folder.

        Raises:
            GuardError: if there is none, it is damaged, or holds anything else.
        """
        if not (Path(folder) / KIND.manifest).is_file():
            raise GuardError(f"{folder} holds no probes of stages; make some with: make bench-screening")
        return cls(Guard.from_pretrained(folder))

    def heads(self, stage: Stage) -> list[int]:
        """Return the places of a stage's detectors: its own, and at an observation drift."""
        names = (stage, DRIFT) if stage == "observation" else (stage,)
        return [place for place, record in enumerate(self.guard.manifest.detectors) if record.name in names]


def reads_stages(guard: Guard) -> bool:
    """Return whether all detectors of a guard are of an agent's stages."""
    return {record.name for record in guard.manifest.detectors} <= set(DETECTORS)


def stage_zone(score: float, bucket: BucketThresholds) -> Zone:
    """Where a span's score lies.

    A breach is acted on and no judge is asked. So where its threshold rests on fewer benign spans than its rate needs,
    it counts as suspect; a score that is not a finite number is a breach all the same.
    """
    found = zone(score, bucket)
    return "suspect" if found == "breach" and math.isfinite(score) and not bucket.breach.enough else found

"""One line of what a bench found: a stream before a system."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

__all__ = ["Outcome", "read_outcomes", "write_outcomes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one stream, or of one group."""

    seed: int
    system: str
    embedding: str
    scene: str
    """Cell of an attack, or what innocent streams these are."""
    stratum: str
    family: str
    """Of the tenant, or the campaign."""
    length: int
    """Requests."""
    alarm: int | None
    """Number of the request that raised the first alarm, from 1; None if none did."""
    begin: int = 0
    """Innocent requests before the campaign's first one."""
    tier: str = ""
    """Which tier alarmed."""
    limit: int | None = None
    """Number of the request that something was done at; None if nothing was."""
    score: float | None = None
    """Of the group that holds most of its accounts."""
    template: bool = False
    """Whether the campaign's requests share words."""

    @property
    def alarmed(self) -> bool:
        """Whether there was an alarm at all."""
        return self.alarm is not None

    @property
    def queries(self) -> float:
        """Requests from the campaign's first one to the alarm; infinite without one, and where it came before."""
        return self._since(self.alarm)

    @property
    def queries_to_limit(self) -> float:
        """The same to where something was done."""
        return self._since(self.limit)

    def _since(self, count: int | None) -> float:
        return count - self.begin if count is not None and count > self.begin else np.inf


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write a file of JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes), encoding="utf-8")
    beside.replace(path)


def read_outcomes(path: Path) -> list[Outcome]:
    """Read what :func:`write_outcomes` wrote."""
    return [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]

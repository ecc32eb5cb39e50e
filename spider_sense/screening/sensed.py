"""What the model's own activations say of one span.

Shape letters: D width.
"""

from dataclasses import dataclass

from torch import Tensor

from spider_sense.types import ZONES, Verdict, Zone

__all__ = ["Sensed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensed:
    """The verdicts of the stage's probes on a span, and the span's mean activation."""

    verdicts: tuple[Verdict, ...]
    """One for each probe of the stage, the drift probe among them; empty if the stage has none."""
    pooled_D: Tensor | None = None
    """[D] float32 on the CPU, see :func:`spider_sense.screening.pooling.pool`; None if no signature site is read."""

    @property
    def seen(self) -> bool:
        """Whether a probe has seen every token of the span."""
        return bool(self.verdicts) and all(verdict.coverage.complete for verdict in self.verdicts)

    @property
    def zone(self) -> Zone:
        """The strictest of the verdicts; at least suspect where evidence is missing."""
        floor: Zone = "clear" if self.seen else "suspect"
        return max([floor, *(verdict.zone for verdict in self.verdicts)], key=ZONES.index)

    @property
    def strictest(self) -> Verdict | None:
        """The verdict of the strictest zone, the first of several; None if there is none."""
        return max(self.verdicts, key=lambda verdict: ZONES.index(verdict.zone), default=None)

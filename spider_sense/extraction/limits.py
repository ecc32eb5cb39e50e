"""What the thresholds of a calibration rest on, and whether anything can cross them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spider_sense.extraction.decision import Tier
from spider_sense.extraction.population import Population
from spider_sense.extraction.thresholds import KINDS, LEAST_KINDS, Calibration, Source

__all__ = ["Limit", "limits"]

_MORE_WORK = "calibrate on more kinds of honest work, each named in `family`"


@dataclass(frozen=True, slots=True)
class Limit:
    """A threshold of one tier and stratum."""

    tier: Tier
    stratum: str
    count: int
    """Honest principals of the stratum; for groups, honest linked groups."""
    threshold: float
    margin: float
    """What the threshold is at least, whatever the honest of calibration reached; -inf of own history."""
    rests_on: str
    """What the threshold was set by, in words."""
    never: str
    """Why nothing can cross it; empty if something can."""
    remedy: str
    """The next step where nothing can."""
    certified: bool
    """Whether its claim holds for principals that live as long. Where nobody is ever limited there is no claim."""

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Threshold, margin, what sets the threshold, and whether its claim holds, for a table."""
        unknown = "unknown" if self.margin > 0 else ""
        return (
            "never limits" if self.never else f"{self.threshold:.2f}",
            f"{self.margin:.2f}" if math.isfinite(self.margin) else unknown,
            self.never or self.rests_on,
            "certified" if self.certified else "uncertified",
        )


def limits(calibration: Calibration, population: Population) -> list[Limit]:
    """Return the thresholds of every tier and stratum."""
    return [
        _limit(calibration, population, tier, stratum)
        for tier, maxima in calibration.maxima.items()
        for stratum in maxima
    ]


def _limit(calibration: Calibration, population: Population, tier: Tier, stratum: str) -> Limit:
    bounds = calibration.bounds(tier, stratum)
    threshold, source = max(bounds.values()), max(bounds, key=bounds.__getitem__)
    never, remedy = _never(calibration, population, tier, stratum, bounds)
    return Limit(
        tier=tier,
        stratum=stratum,
        count=len(calibration.maxima[tier][stratum]),
        threshold=threshold,
        margin=bounds.get("work", -math.inf),
        rests_on=_words(source, tier, threshold, population.floors.get(calibration.stratum(tier, stratum))),
        never=never,
        remedy=remedy,
        certified=not never and calibration.certified(tier, stratum),
    )


def _words(source: Source, tier: Tier, threshold: float, floor: float | None) -> str:
    if tier == "level" and threshold == floor:
        return "highest of the fit"
    honest = "groups" if tier == "group" else "principals"
    return {"principals": f"honest {honest}", "type": "highest of its type", "work": "new kinds of work"}[source]


def _never(
    calibration: Calibration, population: Population, tier: Tier, stratum: str, bounds: Mapping[Source, float]
) -> tuple[str, str]:
    """Return why nothing crosses a threshold, and the next step; empty if something can."""
    ceiling = population.ceiling if tier == "level" else math.inf
    threshold, share = max(bounds.values()), calibration.budget.share(tier)
    honest = "linked groups" if tier == "group" else "principals"
    found = len(calibration.maxima[tier][calibration.stratum(tier, stratum)])
    if threshold < ceiling:
        return "", ""
    if bounds["principals"] == math.inf:
        needed = math.ceil(1 / share - 1e-6) - 1
        if found >= needed:
            return f"too few of {found} honest {honest} sent enough", f"calibrate on honest {honest} with longer lives"
        return f"{share:.2%} needs {needed} honest {honest}, there are {found}", f"calibrate on more honest {honest}"
    if bounds.get("work") == math.inf:
        if tier == "group":
            return f"too few kinds of work, at least {KINDS} are needed", _MORE_WORK
        horizon = calibration.horizons.get(calibration.stratum(tier, stratum))
        lived = "" if horizon is None else f", by principals with lives of {horizon} requests"
        return f"too few kinds of work, at least {LEAST_KINDS} are needed{lived}", _MORE_WORK
    reached = f"the threshold is {threshold:.2f}, and nothing can exceed {ceiling:.2f}"
    return reached, _MORE_WORK if threshold == bounds.get("work") else f"calibrate on more honest {honest}"

"""Thresholds over principals: each tier's share of the honest principals that may ever be alarmed.

The statistic of a principal is the maximum over its life. If a new honest principal is exchangeable with the n of
calibration, ``p = (1 + #{their maxima >= its value so far}) / (n + 1)`` falls to ``a`` or below at any time of its life
with probability at most ``a``, whatever the dependence inside the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from spider_sense.config import Settings
from spider_sense.errors import ConfigError
from spider_sense.extraction.decision import Tier

__all__ = ["CERTIFIED", "EVERYBODY", "Budget", "Calibration", "Maxima"]

CERTIFIED = 299
"""Honest principals that a claim of 1% needs: with none of them alarmed, 95% confidence."""
EVERYBODY = ""
"""The stratum of all principals."""

Maxima = Mapping[str, NDArray[np.float64]]
"""By stratum: each principal's maximum, in any order."""


class Budget(Settings):
    """How the share of honest principals that may ever be alarmed is split over the tiers; the sum is the whole."""

    own: float = Field(default=0.004, gt=0, lt=1)
    level: float = Field(default=0.004, gt=0, lt=1)
    group: float = Field(default=0.002, gt=0, lt=1)

    def share(self, tier: Tier) -> float:
        """Return the share of a tier.

        Raises:
            ConfigError: for the tier of rules, which has none.
        """
        if tier == "rule":
            raise ConfigError("rules have no share of the budget; they are deterministic")
        return float(getattr(self, tier))

    @property
    def whole(self) -> float:
        """Bound on the share of honest principals that are ever alarmed."""
        return self.own + self.level + self.group


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Maxima of honest principals, by tier and stratum (Mondrian conformal prediction)."""

    maxima: Mapping[Tier, Maxima]
    """Sorted. Each tier has the stratum of everybody; groups have no other."""
    budget: Budget

    @classmethod
    def fit(
        cls,
        own: NDArray[np.float64],
        level: NDArray[np.float64],
        strata: Sequence[str],
        groups: NDArray[np.float64] | None = None,
        budget: Budget | None = None,
    ) -> "Calibration":
        """Keep the maxima of N honest principals.

        Args:
            own: [N].
            level: [N].
            strata: tenant type of each; empty is none.
            groups: maxima of honest *linked* groups; random groups are the wrong reference.
            budget: how the false alarms are split.

        Raises:
            ConfigError: if the lengths differ or a maximum is NaN.
        """
        if not len(own) == len(level) == len(strata):
            raise ConfigError(
                f"{len(own)} and {len(level)} maxima for {len(strata)} strata; give one for each principal"
            )
        groups = np.zeros(0) if groups is None else groups
        if np.isnan(own).any() or np.isnan(level).any() or np.isnan(groups).any():
            raise ConfigError("a maximum is NaN; a stream without activations has -inf")
        names = np.array(strata)
        maxima: dict[Tier, Maxima] = {"group": {EVERYBODY: np.sort(groups)}}
        tiers: tuple[tuple[Tier, NDArray[np.float64]], ...] = (("own", own), ("level", level))
        for tier, values in tiers:
            by_stratum = {str(name): np.sort(values[names == name]) for name in np.unique(names) if name}
            maxima[tier] = {EVERYBODY: np.sort(values), **by_stratum}
        return cls(maxima, budget or Budget())

    def stratum(self, tier: Tier, tenant: str) -> str:
        """Return the stratum that a tenant type is judged by: its own if it is large enough, else everybody."""
        found = self.maxima[tier].get(tenant)
        return tenant if found is not None and len(found) >= CERTIFIED else EVERYBODY

    def certified(self, tier: Tier, tenant: str) -> bool:
        """Return whether the tenant's own stratum is large enough; without a tenant type, whether everybody is."""
        found = self.maxima[tier].get(EVERYBODY if tier == "group" else tenant)
        return found is not None and len(found) >= CERTIFIED

    def threshold(self, tier: Tier, tenant: str = EVERYBODY, share: float | None = None) -> float:
        """Return what a statistic must exceed: infinity where there are too few principals for the share.

        A stratum that is too small to be judged by alone can only raise the threshold, to its highest maximum.

        Args:
            tier: own, level or group.
            tenant: declared type of the principal.
            share: of honest principals; by default the tier's share of the budget.
        """
        values = self.maxima[tier][self.stratum(tier, tenant)]
        allowed = int(np.floor((self.budget.share(tier) if share is None else share) * (len(values) + 1) + 1e-9))
        threshold = float(values[-allowed]) if allowed else np.inf
        small = self.maxima[tier].get(tenant, values)
        return max(threshold, float(small[-1])) if 0 < len(small) < CERTIFIED and tenant else threshold

    def p_value(self, tier: Tier, tenant: str, score: float) -> float:
        """Return the conformal p-value of a principal's maximum so far, in its stratum."""
        values = self.maxima[tier][self.stratum(tier, tenant)]
        above = len(values) - int(np.searchsorted(values, score, side="left"))
        return (1 + above) / (len(values) + 1)

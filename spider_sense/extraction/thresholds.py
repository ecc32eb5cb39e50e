"""Thresholds over principals: each tier's share of the honest principals that may ever be alarmed.

The statistic of a principal is the maximum over its life. If a new honest principal is exchangeable with the n of
calibration, ``p = (1 + #{their maxima >= its value so far}) / (n + 1)`` falls to ``a`` or below at any time of its life
with probability at most ``a``, whatever the dependence inside the stream. A maximum grows with the life, and most lives
are short: whoever lives long is not exchangeable with all. So ``p`` is taken twice, over all n and over those who lived
as long as the longest-lived 299, up to the horizon, and the larger counts. That bounds the share of all, and that of
those who send as much as the horizon; nothing is claimed of what anybody sends beyond it.

Principals who do the same kind of work lie at the same level, and the next one may do another kind. So the level's
threshold is also at least what the highest level of a new kind of work stays below, if those of the F kinds are
normal: their mean and ``t sqrt(1 + 1 / F)`` standard deviations, with Student's t of F - 1 degrees. One kind alone
tells nothing of the next: the threshold is infinite. The same holds for linked groups whose members all do one kind of
work, and there fewer than five kinds tell nothing. A group of which that is not known is no kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from spider_sense.config import Settings
from spider_sense.errors import ConfigError, MissingExtraError
from spider_sense.extraction.decision import Tier

__all__ = ["CERTIFIED", "EVERYBODY", "KINDS", "LEAST_KINDS", "Budget", "Calibration", "HonestGroup", "Maxima", "Source"]

CERTIFIED = 299
"""Honest principals that a claim of 1% needs: with none of them alarmed, 95% confidence."""
LEAST_KINDS = 2
"""Kinds of work of principals that tell where the next kind may lie."""
KINDS = 5
"""Kinds of work, each shared by all members of a group, that tell where the groups of the next kind may lie."""
EVERYBODY = ""
"""The stratum of all principals."""

Source = Literal["principals", "type", "work"]
"""What a threshold rests on: how high the honest came, the highest of a type that is too small to be judged alone, or
how high a new kind of work may come."""

Maxima = Mapping[str, NDArray[np.float64]]
"""By stratum: each principal's maximum, in any order."""


class Budget(Settings):
    """Which shares of the honest may ever be limited."""

    own: float = Field(default=0.006, gt=0, lt=1)
    """Of principals, by their own history; it takes a high level besides."""
    level: float = Field(default=0.004, gt=0, lt=1)
    """Of principals, by their level."""
    group: float = Field(default=0.01, gt=0, lt=1)
    """Of linked groups."""

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
        """Bound on the share of honest principals that are ever limited for what they do alone."""
        return self.own + self.level


@dataclass(frozen=True, slots=True)
class HonestGroup:
    """A linked group of calibration."""

    tenant: str
    """Declared type of all members; empty if they differ."""
    work: str | None
    """The kind of work that all of them do; None if they differ, empty if it is not known."""
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Maxima of honest principals, by tier and stratum (Mondrian conformal prediction)."""

    maxima: Mapping[Tier, Maxima]
    """Sorted. Each tier has the stratum of everybody."""
    budget: Budget
    horizons: Mapping[str, int] = field(default_factory=dict)
    """By stratum: requests that at least 299 of its principals lived to send, more where a share of the budget takes
    more; none where there are fewer than 299."""
    least: Mapping[Tier, Mapping[str, float]] = field(default_factory=dict)
    """Of level and group, by stratum: what the threshold is at least."""
    unnamed: int = 0
    """Honest principals of which it is not known what kind of work they do. Each was counted as a kind of its own, so
    the level's margin for new kinds is too small, and its claim holds for the kinds of calibration alone."""
    unnamed_groups: int = 0
    """Honest linked groups of which it is not known whether all members do one kind of work. None was counted as a
    kind, so the margin of groups rests on the others alone."""
    lasting: Mapping[Tier, Maxima] = field(default_factory=dict)
    """Of own and level: the maxima of those who lived to the horizon of their stratum."""

    @classmethod
    def fit(
        cls,
        own: NDArray[np.float64],
        level: NDArray[np.float64],
        strata: Sequence[str],
        lives: NDArray[np.integer[Any]],
        work: Sequence[str] | None = None,
        groups: Sequence[HonestGroup] = (),
        floors: Mapping[str, float] | None = None,
        budget: Budget | None = None,
        unnamed: int = 0,
    ) -> "Calibration":
        """Keep the maxima of N honest principals.

        Args:
            own: [N].
            level: [N].
            strata: tenant type of each; empty is none.
            lives: requests of each, [N].
            work: what kind of work each does; without it each does its own.
            groups: honest *linked* groups; random groups are the wrong reference.
            floors: by stratum, what the level's threshold is at least.
            budget: how the false alarms are split.
            unnamed: of how many nobody said what work they do.

        Raises:
            ConfigError: if the lengths differ or a maximum is NaN.
            MissingExtraError: if scipy is not installed.
        """
        if not len(own) == len(level) == len(strata) == len(lives):
            raise ConfigError(
                f"{len(own)} and {len(level)} maxima for {len(strata)} strata and {len(lives)} lives; "
                "give one for each principal"
            )
        together = np.array([group.score for group in groups], dtype=np.float64)
        if np.isnan(own).any() or np.isnan(level).any() or np.isnan(together).any():
            raise ConfigError("a maximum is NaN; a stream without activations has -inf")
        rows, of_groups = _rows(strata), _rows([group.tenant for group in groups])
        maxima: dict[Tier, Maxima] = {
            "own": {name: np.sort(own[chosen]) for name, chosen in rows.items()},
            "level": {name: np.sort(level[chosen]) for name, chosen in rows.items()},
            "group": {name: np.sort(together[chosen]) for name, chosen in of_groups.items()},
        }
        budget, kinds = budget or Budget(), np.array(work or [str(place) for place in range(len(own))])
        horizons = _horizons(lives, rows, budget)
        lasting = {name: chosen & (lives >= horizons.get(name, 0)) for name, chosen in rows.items()}
        shared = np.array([group.work or "" for group in groups], dtype=np.str_)
        unknown = sum(group.work == "" for group in groups)
        least: dict[Tier, Mapping[str, float]] = {
            "level": {
                name: max(
                    (floors or {}).get(name, -np.inf),
                    _new_work(level[chosen], kinds[chosen], budget.level, LEAST_KINDS),
                    _new_work(level[lasting[name]], kinds[lasting[name]], budget.level, LEAST_KINDS),
                )
                for name, chosen in rows.items()
            },
            "group": {
                name: _new_work(together[chosen & (shared != "")], shared[chosen & (shared != "")], budget.group, KINDS)
                for name, chosen in of_groups.items()
            },
        }
        return cls(
            maxima,
            budget,
            horizons,
            least,
            unnamed,
            unknown,
            {
                "own": {name: np.sort(own[lasting[name]]) for name in horizons},
                "level": {name: np.sort(level[lasting[name]]) for name in horizons},
            },
        )

    def stratum(self, tier: Tier, tenant: str) -> str:
        """Return the stratum that a tenant type is judged by: its own if it is large enough, else everybody."""
        found = self.maxima[tier].get(tenant)
        return tenant if found is not None and len(found) >= CERTIFIED else EVERYBODY

    def certified(self, tier: Tier, tenant: str, count: int = 0) -> bool:
        """Return whether what is claimed of a tier holds for a principal.

        Args:
            tier: own, level or group.
            tenant: its declared type, whose stratum must be large enough; without one, that of everybody.
            count: its requests, no more than so many of the stratum lived to send.
        """
        unknown = {"level": self.unnamed, "group": self.unnamed_groups}.get(tier, 0)
        return self.enough(tier, tenant, count) and not unknown

    def enough(self, tier: Tier, tenant: str, count: int = 0) -> bool:
        """Return whether as many principals were seen as a claim takes, with as long lives; see ``certified``."""
        if tier == "group":
            return len(self.maxima[tier].get(tenant, ())) >= CERTIFIED
        return tenant in self.horizons and count <= self.horizons[tenant]

    def threshold(self, tier: Tier, tenant: str = EVERYBODY, share: float | None = None) -> float:
        """Return what a statistic must exceed: infinity where too few principals, or too few long lives, are there.

        A stratum that is too small to be judged by alone can only raise the threshold, to its highest maximum.

        Args:
            tier: own, level or group.
            tenant: declared type of the principal.
            share: of honest principals; by default the tier's share of the budget.
        """
        return max(self.bounds(tier, tenant, share).values())

    def bounds(self, tier: Tier, tenant: str = EVERYBODY, share: float | None = None) -> dict[Source, float]:
        """Return what a threshold rests on, of which it is the highest; see there."""
        stratum, small = self.stratum(tier, tenant), self.maxima[tier].get(tenant, np.zeros(0))
        wanted = self.budget.share(tier) if share is None else share
        reached = max(_reached(values, wanted) for values in self._compared(tier, stratum))
        # Where none of the honest sent enough for a statistic, nothing is known of those who do.
        found: dict[Source, float] = {"principals": reached if reached > -np.inf else np.inf}
        if tenant != stratum and len(small):
            found["type"] = float(small[-1])
        if share is None and tier in self.least:
            least, also = self.least[tier], (tenant,) if tier == "group" else ()
            found["work"] = max(least.get(name, -np.inf) for name in (stratum, *also))
        return found

    def p_value(self, tier: Tier, tenant: str, score: float) -> float:
        """Return the conformal p-value of a principal's maximum so far, in its stratum."""
        p_value = max(_share_above(values, score) for values in self._compared(tier, self.stratum(tier, tenant)))
        if score > self.threshold(tier, tenant):
            return p_value
        # A level that a new kind of work may reach is no evidence beyond the tier's share.
        return max(p_value, float(np.nextafter(self.budget.share(tier), 1)))

    def _compared(self, tier: Tier, stratum: str) -> list[NDArray[np.float64]]:
        """Return the maxima that a stratum is judged by: of all, and of those who lived to its horizon."""
        lasting = self.lasting.get(tier, {}).get(stratum)
        return [self.maxima[tier][stratum], *([] if lasting is None else [lasting])]


def _horizons(
    lives_N: NDArray[np.integer[Any]], rows: Mapping[str, NDArray[np.bool_]], budget: Budget
) -> dict[str, int]:
    """Return what so many of each stratum lived to send that the shares of the budget can be told from zero."""
    wanted = max(CERTIFIED, *(int(np.ceil(1 / share - 1e-6)) - 1 for share in (budget.own, budget.level)))
    longest = {name: np.sort(lives_N[chosen])[::-1][:wanted] for name, chosen in rows.items()}
    return {name: int(found[-1]) for name, found in longest.items() if len(found) >= CERTIFIED}


def _reached(values_N: NDArray[np.float64], share: float) -> float:
    """Return what at most a share of principals like these exceed; infinite where they are too few."""
    allowed = int(np.floor(share * (len(values_N) + 1) + 1e-9))
    return float(values_N[-allowed]) if allowed else np.inf


def _share_above(values_N: NDArray[np.float64], score: float) -> float:
    """Return the conformal p-value of a score among sorted maxima."""
    above = len(values_N) - int(np.searchsorted(values_N, score, side="left"))
    return (1 + above) / (len(values_N) + 1)


def _rows(strata: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Return who belongs to each stratum, everybody's first."""
    names = np.array(strata, dtype=np.str_)
    return {EVERYBODY: np.ones(len(names), dtype=bool)} | {
        str(name): names == name for name in np.unique(names) if name
    }


def _new_work(values_N: NDArray[np.float64], kind_N: NDArray[np.str_], share: float, fewest: int) -> float:
    """Return what a new kind of work stays below but for a share, by the highest values of the kinds that are there."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingExtraError("scipy", "train") from error
    highest = np.array([values_N[kind_N == kind].max() for kind in np.unique(kind_N)])
    highest = highest[np.isfinite(highest)]
    count = len(highest)
    if count < fewest:
        return np.inf
    return float(highest.mean() + t.ppf(1 - share, count - 1) * highest.std(ddof=1) * np.sqrt(1 + 1 / count))

"""Choose a probe: fit every family on every site, compare on the validation part, keep the best.

The solved families (mass mean, logistic) are cheap and are fitted on each site; the site where the better of them does
best, a spread of four sites, and all sites together are then given to the families that are fitted by gradient descent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spider_sense.activations import ActivationSet
from spider_sense.metrics import auroc, log_auroc, tpr_at_fpr
from spider_sense.offline import score_activations
from spider_sense.scoring import Probe
from spider_sense.training.families import DESIGNS, fit
from spider_sense.training.options import FitOptions
from spider_sense.types import Site

__all__ = ["Candidate", "Sweep", "sweep"]

SPREAD = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fitted probe and how it does on the validation part."""

    probe: Probe
    sites: tuple[Site, ...]
    auroc: float
    log_auroc: float
    tpr: float
    """At 1% false positives."""

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better."""
        return self.tpr, self.log_auroc


@dataclass(frozen=True, slots=True)
class Sweep:
    """All candidates, best first."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate that is kept."""
        return self.candidates[0]


@dataclass(frozen=True, slots=True)
class Task:
    """What is swept: captured conversations, their labels, and who is in which part."""

    data: ActivationSet
    labels: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    name: str
    """Name of the detector."""

    def candidate(self, family: str, sites: tuple[Site, ...], options: FitOptions) -> Candidate:
        """Fit one probe and measure it."""
        probe = fit(family, self.data, self.train, self.labels, sites, self.name, options)
        scores = score_activations([probe], self.data, self.validation).peak_NH[:, 0]
        labels = self.labels[self.validation]
        area, log_area = auroc(scores, labels), log_auroc(scores, labels)
        tpr = tpr_at_fpr(scores, labels, 0.01).tpr.value
        assert area is not None
        assert log_area is not None
        assert tpr is not None
        return Candidate(probe, sites, area, log_area, tpr)


def sweep(
    task: Task,
    sites: Sequence[Site],
    families: Sequence[str],
    options: FitOptions,
    advance: Callable[[Candidate], None] | None = None,
) -> Sweep:
    """Fit and rank all candidates.

    Args:
        task: what to fit on and to choose by.
        sites: captured sites, from shallow to deep.
        families: families to try.
        options: for all of them.
        advance: called with each candidate.
    """
    candidates: list[Candidate] = []

    def attempt(family: str, where: tuple[Site, ...]) -> Candidate:
        candidate = task.candidate(family, where, options)
        candidates.append(candidate)
        if advance is not None:
            advance(candidate)
        return candidate

    solved = [family for family in families if family not in DESIGNS]
    singles = [attempt(family, (site,)) for site in sites for family in solved or ["mass_mean"]]
    best_site = max(singles, key=lambda candidate: candidate.rank).sites
    for where in site_sets(sites, best_site):
        for family in families:
            if (family in DESIGNS or len(where) > 1) and not (family == "mlp" and len(where) > 1):
                attempt(family, where)
    return Sweep(tuple(sorted(candidates, key=lambda candidate: candidate.rank, reverse=True)))


def site_sets(sites: Sequence[Site], best: tuple[Site, ...]) -> list[tuple[Site, ...]]:
    """Return the best site alone, a spread of four over the deeper three quarters, and all sites."""
    deeper = sites[len(sites) // 4 :]
    picked = np.unique(np.linspace(0, len(deeper) - 1, min(SPREAD, len(deeper))).round().astype(int))
    sets = [best, tuple(deeper[index] for index in picked), tuple(sites)]
    return list(dict.fromkeys(sets))

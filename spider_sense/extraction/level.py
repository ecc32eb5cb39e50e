"""Tier 2: how far a principal lies from honest ones, one model for each number of requests, and one for recent ones.

All features grow with suspicion and weigh the same. Weights that are learned, on few families of honest work and of
campaigns, tell those families apart; equal ones do not, and they need no simulated attackers.

Shape letters: N principals, F features.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LevelModel"]

CUT = 4.0
"""Standard deviations beyond which a feature no longer counts: one odd habit must not decide."""


@dataclass(frozen=True, slots=True, eq=False)
class LevelModel:
    """``(sum(clip((x - mean) / scale)) - centre) / spread``: 0 is the median of honest principals, 1 their 95th
    percentile."""

    mean: NDArray[np.float64]
    """[F]"""
    scale: NDArray[np.float64]
    """[F]; infinite for a feature that never varied."""
    centre: float
    spread: float

    @classmethod
    def fit(cls, honest_NF: NDArray[np.float64]) -> "LevelModel":
        """Fit on N honest principals."""
        mean, scale = honest_NF.mean(axis=0), honest_NF.std(axis=0)
        scale = np.where(scale > 1e-6, scale, np.inf)
        centre, high = np.quantile(_standard(honest_NF, mean, scale).sum(axis=1), [0.5, 0.95])
        return cls(mean, scale, float(centre), max(float(high - centre), 1e-6))

    def score(self, features_NF: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the score of each principal, [N]."""
        result: NDArray[np.float64] = _standard(features_NF, self.mean, self.scale).sum(axis=1) - self.centre
        return result / self.spread

    def contributions(self, features_F: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what each feature of one principal adds to its score, [F]."""
        return _standard(features_F, self.mean, self.scale) / self.spread


def _standard(x: NDArray[np.float64], mean: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip((x - mean) / scale, -CUT, CUT)

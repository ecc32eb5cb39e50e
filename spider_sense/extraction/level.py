"""Tier 2: a logistic score of what a principal looks like, one model for each number of requests.

Shape letters: N principals, F features.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import DataError, MissingExtraError

__all__ = ["LevelModel"]

CUT = 4.0
"""Standard deviations beyond which a feature no longer counts: one odd habit must not decide."""
PENALTY = 0.02
"""Inverse strength of the L2 penalty."""


@dataclass(frozen=True, slots=True, eq=False)
class LevelModel:
    """``((clip((x - mean) / scale) @ weight) - centre) / spread``: 0 is the median of benign principals, 1 their 95th
    percentile."""

    mean: NDArray[np.float64]
    """[F]"""
    scale: NDArray[np.float64]
    """[F]; infinite for a feature that never varied."""
    weight: NDArray[np.float64]
    """[F]"""
    centre: float
    spread: float

    @classmethod
    def fit(
        cls, benign_NF: NDArray[np.float64], attackers_NF: NDArray[np.float64], normaliser_NF: NDArray[np.float64]
    ) -> "LevelModel":
        """Fit an L2 logistic regression, both classes weighing the same.

        Args:
            benign_NF: honest principals to train on.
            attackers_NF: attacking ones.
            normaliser_NF: other honest principals, which set the scale.

        Raises:
            DataError: if one of the three is empty.
            MissingExtraError: if scikit-learn is not installed.
        """
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise MissingExtraError("scikit-learn", "train") from error
        for name, rows in (("benign", benign_NF), ("attacking", attackers_NF), ("normalising", normaliser_NF)):
            if not len(rows):
                raise DataError(f"a level model has no {name} principal to be fitted on; give more streams")
        mean, scale = benign_NF.mean(axis=0), benign_NF.std(axis=0)
        both = np.concatenate([benign_NF, attackers_NF])
        # A feature that only attackers vary in is scaled by all.
        scale = np.where(scale > 1e-6, scale, np.where(both.std(axis=0) > 1e-6, both.std(axis=0), np.inf))
        model = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=2000)
        model.fit(_standard(both, mean, scale), np.repeat([0, 1], [len(benign_NF), len(attackers_NF)]))
        weight = np.asarray(model.coef_[0], dtype=np.float64)
        raw = _standard(normaliser_NF, mean, scale) @ weight
        centre, high = np.quantile(raw, [0.5, 0.95])
        return cls(mean, scale, weight, float(centre), max(float(high - centre), 1e-6))

    def score(self, features_NF: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the score of each principal, [N]."""
        # Summed row by row: a matrix product's rounding depends on how many principals share it.
        raw = (_standard(features_NF, self.mean, self.scale) * self.weight).sum(axis=1)
        result: NDArray[np.float64] = (raw - self.centre) / self.spread
        return result

    def contributions(self, features_F: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what each feature of one principal adds to its score, [F]."""
        return _standard(features_F, self.mean, self.scale) * self.weight / self.spread


def _standard(x: NDArray[np.float64], mean: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip((x - mean) / scale, -CUT, CUT)

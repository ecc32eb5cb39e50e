"""Families that are solved on conversation means: the mean of linear token logits is the linear logit of the mean.

Shape letters: N conversations, F features.
"""

import numpy as np
import numpy.typing as npt

from spider_sense.errors import DataError, MissingExtraError
from spider_sense.training.features import TrainingSet, moments

__all__ = ["logistic", "mass_mean"]

Doubles = npt.NDArray[np.float64]

REGULARISATION = 0.003
"""Inverse strength C of the L2 penalty, on standardised features."""
ITERATIONS = 5000


def mass_mean(rows: TrainingSet) -> tuple[Doubles, float]:
    """Return the weight [F] and bias of the difference of class means as a logit.

    Along the difference d the two classes are taken for normal with one variance, the pooled one within the classes;
    their log odds are then d x |d|^2 / variance, 0 half way between the means (arXiv 2310.06824, section 5, with the
    covariance replaced by that one number).

    Raises:
        DataError: if the class means agree, or no conversation differs from its class mean.
    """
    means_NF = rows.conversation_means()
    positive, negative = (
        np.average(means_NF[side], axis=0, weights=rows.weight_N[side]) for side in (rows.label_N, ~rows.label_N)
    )
    direction = positive - negative
    projected = (means_NF - np.where(rows.label_N[:, None], positive, negative)) @ direction
    variance = float(np.average(projected**2, weights=rows.weight_N))
    squared = float(direction @ direction)
    if squared == 0 or variance <= 1e-12 * squared**2:
        raise DataError("mass_mean needs class means that differ and conversations that vary; give it more of them")
    weight = direction * (squared / variance)
    return weight, -float(weight @ (positive + negative)) / 2


def logistic(rows: TrainingSet) -> tuple[Doubles, float]:
    """Return the weight [F] and bias of a balanced logistic regression on standardised conversation means.

    Raises:
        MissingExtraError: if scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    means_NF = rows.conversation_means()
    mean, deviation = moments(means_NF)
    model = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=ITERATIONS)
    model.fit((means_NF - mean) / deviation, rows.label_N, sample_weight=rows.weight_N)
    weight: Doubles = model.coef_[0] / deviation
    return weight, float(model.intercept_[0] - weight @ mean)

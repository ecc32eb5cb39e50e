"""The recipes: from pooled activations and labels to one weight a row of a projection.

============  ==============================================================  =====================================
recipe        weight of a row                                                 features
============  ==============================================================  =====================================
probe         of an L2 logistic regression, classes balanced                  standardised, masked pooling
contrast      mean over harmful minus mean over benign prompts                plain, masked pooling
effect_size   Cohen's d: that difference over the pooled standard deviation   standardised, masked pooling
raw           of a logistic layer trained by Adam                             plain, padding pooled too, no held-out
============  ==============================================================  =====================================

``raw`` is the public code of NeuroStrike (arXiv 2509.11864), four of whose authors wrote NeST: one linear layer a
projection, ``BCEWithLogitsLoss``, Adam at 1e-3 with a weight decay of 1e-3, 5,000 epochs of the full batch. It fits the
projections one after the other, some 4 seconds for 600 prompts and 1,536 rows on a free CPU core.

Shape letters: N prompts, F rows of a projection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nest.activations import Pool
from spider_sense.errors import ConfigError, MissingExtraError, nearest

__all__ = ["RECIPES", "Recipe", "RecipeName", "recipe", "z_scores"]

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Weigh = Callable[[Floats, Bools], Floats]
"""From features [N, F] and labels [N], True for harmful, to weights [F]."""

RecipeName = Literal["probe", "raw", "contrast", "effect_size"]
RECIPES: tuple[str, ...] = get_args(RecipeName)
ITERATIONS = 5000
"""Most steps of the logistic regression's solver; it needs a few dozen."""
RAW_LEARNING_RATE, RAW_WEIGHT_DECAY = 1e-3, 1e-3


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights are made."""

    weigh: Weigh
    standardise: bool
    """Whether features get mean 0 and deviation 1 over the prompts that are fitted."""
    hold_out: bool
    """Whether some prompts are kept out of the fit."""
    pool: Pool


def recipe(name: str, *, c: float, epochs: int, seed: int) -> Recipe:
    """Return a recipe by its name.

    Args:
        name: one of `RECIPES`.
        c: inverse strength of the L2 penalty of ``probe``.
        epochs: of ``raw``.
        seed: of ``raw``: where its weights start.

    Raises:
        ConfigError: if there is no such recipe.
        MissingExtraError: for ``probe`` without scikit-learn.
    """
    match name:
        case "probe":
            return Recipe(_logistic(c), standardise=True, hold_out=True, pool="max")
        case "contrast":
            return Recipe(_contrast, standardise=False, hold_out=True, pool="max")
        case "effect_size":
            return Recipe(_effect_size, standardise=True, hold_out=True, pool="max")
        case "raw":
            return Recipe(_adam(epochs, seed), standardise=False, hold_out=False, pool="raw")
    raise ConfigError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")


def z_scores(weight_F: Floats) -> Floats:
    """Return weights less their mean over their standard deviation; zeros where all are alike."""
    deviation = weight_F.std()
    return (weight_F - weight_F.mean()) / deviation if deviation > 0 else np.zeros_like(weight_F)


def _logistic(c: float) -> Weigh:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error

    def weigh(features_NF: Floats, label_N: Bools) -> Floats:
        model: Any = LogisticRegression(C=c, class_weight="balanced", max_iter=ITERATIONS)
        weight_F: Floats = model.fit(features_NF, label_N).coef_[0].astype(np.float32)
        return weight_F

    return weigh


def _contrast(features_NF: Floats, label_N: Bools) -> Floats:
    difference_F: Floats = features_NF[label_N].mean(0) - features_NF[~label_N].mean(0)
    return difference_F


def _effect_size(features_NF: Floats, label_N: Bools) -> Floats:
    parts = features_NF[label_N], features_NF[~label_N]
    squares_F = sum(((part - part.mean(0)) ** 2).sum(0) for part in parts)
    pooled_F = np.sqrt(squares_F / (len(label_N) - 2))
    # A row that never varies within a class says nothing that could be told from chance.
    return np.where(pooled_F > 0, _contrast(features_NF, label_N) / np.where(pooled_F > 0, pooled_F, 1), 0)


def _adam(epochs: int, seed: int) -> Weigh:
    def weigh(features_NF: Floats, label_N: Bools) -> Floats:
        features, target = torch.from_numpy(features_NF), torch.from_numpy(label_N).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = nn.Linear(features.shape[1], 1)
        optimizer = torch.optim.Adam(layer.parameters(), lr=RAW_LEARNING_RATE, weight_decay=RAW_WEIGHT_DECAY)
        for _ in range(epochs):
            # The gradient of the mean cross-entropy in closed form: autograd would take twice the time.
            with torch.no_grad():
                error_N = (torch.sigmoid(layer(features)[:, 0]) - target) / len(target)
                layer.weight.grad = (error_N @ features)[None]
                layer.bias.grad = error_N.sum()[None]
            optimizer.step()
        weight_F: Floats = layer.weight.detach()[0].numpy()
        return weight_F

    return weigh

"""Select rows of the projections from activations that were pooled before; another selection costs no further pass.

A row is kept where its weight in the recipe (:mod:`nest.scores`) is positive and its z-score within the projection
above a threshold. An expert of a mixture is judged on the prompts that reach it; one that too few reach is left out.

Shape letters: N prompts, F rows of a projection, R selected rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from rich.progress import Progress
from torch import Tensor

from nest.expert_activations import reached
from nest.scores import Recipe, RecipeName, recipe, z_scores
from spider_sense.config import Settings
from spider_sense.data import Example
from spider_sense.errors import DataError
from spider_sense.labels import LabelledSet
from spider_sense.metrics import auroc
from spider_sense.splits import split
from spider_sense.types import Site

__all__ = ["FEWEST", "PooledPrompts", "SelectConfig", "Selection", "select", "select_rows", "standardised"]

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

FEWEST = 8
"""Prompts of each class below which nothing is looked for, in a model or in one of its experts."""


class SelectConfig(Settings):
    """How rows are selected."""

    recipe: RecipeName = "probe"
    z: float = Field(default=3.0, ge=0, allow_inf_nan=False)
    """A row is kept above this z-score. Of weights that are normally distributed 0.13% lie above 3."""
    c: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Inverse strength of the L2 penalty of ``probe``. Ten or a hundred times more separates unseen prompts slightly
    better, but which rows carry the weight then depends on the draw of the prompts."""
    epochs: int = Field(default=5000, ge=1)
    """Of ``raw``."""
    held_out: float = Field(default=0.25, gt=0, lt=1)
    """Share of the prompts that the weights are checked on and not fitted on."""
    seed: int = Field(default=0, ge=0)

    def chosen(self) -> Recipe:
        """Return the recipe, ready to be used.

        Raises:
            MissingExtraError: for ``probe`` without scikit-learn.
        """
        return recipe(self.recipe, c=self.c, epochs=self.epochs, seed=self.seed)


@dataclass(frozen=True, slots=True, eq=False)
class PooledPrompts:
    """Prompts of two classes and what the projections put out on each."""

    examples: tuple[Example, ...]
    label_N: Bools
    """True for the class whose neurons are looked for."""
    pooled: Mapping[Site, Tensor]
    """[N, F] float32 for each site, as :func:`nest.activations.pooled_activations` returns them."""

    def reaching(self, site: Site) -> Bools:
        """Return which prompts have a value at a site, bool [N]: all, but in an expert those that reach it."""
        if site.expert is None:
            return np.ones(len(self.label_N), dtype=np.bool_)
        return reached(self.pooled[site]).numpy()

    def reach(self, site: Site) -> int:
        """Return how many prompts of the smaller class have a value at a site."""
        label_N = self.label_N[self.reaching(site)]
        return int(min(label_N.sum(), (~label_N).sum()))

    def fitted(self, held_out: float, seed: int) -> Bools:
        """Return which prompts the weights are fitted on, bool [N]; a pair is never separated.

        Raises:
            DataError: if one class has no prompt among them.
        """
        prompts = LabelledSet(examples=self.examples, labels=self.label_N)
        train = split(prompts, {"fitted": 1 - held_out, "held out": held_out}, seed)["fitted"]
        if len(set(train.labels.tolist())) < 2:
            raise DataError(
                f"of {len(self.examples)} prompts, the {len(train)} that are fitted are of one class; "
                "give more prompts, or hold out a smaller share"
            )
        groups = {example.group for example in train.examples}
        return np.array([example.group in groups for example in self.examples])


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What was selected in one projection."""

    neuron_R: Tensor
    """int64, ascending."""
    score_R: Tensor
    """float32: z-scores."""
    held_out_auroc: float | None
    """None where nothing is held out, or one class of it is empty."""

    def less(self, rows: Tensor) -> "Selection":
        """Return the selection without these rows."""
        keep_R = ~torch.isin(self.neuron_R, rows)
        return Selection(self.neuron_R[keep_R], self.score_R[keep_R], self.held_out_auroc)


def select(prompts: PooledPrompts, config: SelectConfig, progress: Progress | None = None) -> dict[Site, Selection]:
    """Select rows of every projection.

    Args:
        prompts: both classes, pooled as the recipe asks.
        config: the recipe.
        progress: gets a bar that counts projections.

    Returns:
        What was selected, for every projection but those of experts that fewer than ``FEWEST`` prompts of a class
        reach, or none that is fitted.

    Raises:
        DataError: if the prompts that are fitted lack a class, or too few reach every expert.
        MissingExtraError: for ``probe`` without scikit-learn.
    """
    chosen = config.chosen()
    fitted_N = np.ones(len(prompts.label_N), dtype=np.bool_)
    if chosen.hold_out:
        fitted_N = prompts.fitted(config.held_out, config.seed)
    task = None if progress is None else progress.add_task("Weighing rows", total=len(prompts.pooled))
    selected = {}
    for site, pooled_NF in prompts.pooled.items():
        label_N, on_N = prompts.label_N, prompts.reaching(site)
        if site.expert is None or _is_enough(label_N[on_N], fitted_N[on_N]):
            selected[site] = select_rows(pooled_NF[on_N], label_N[on_N], fitted_N[on_N], chosen, config.z)
        if progress is not None and task is not None:
            progress.advance(task)
    if not selected:
        raise DataError(
            f"no expert is reached by {FEWEST} prompts of each class, some of them among the fitted ones; give more "
            "prompts"
        )
    return selected


def _is_enough(label_N: Bools, fitted_N: Bools) -> bool:
    classes = label_N, ~label_N
    return all(class_N.sum() >= FEWEST and (class_N & fitted_N).any() for class_N in classes)


def select_rows(pooled_NF: Tensor, label_N: Bools, fitted_N: Bools, chosen: Recipe, z: float) -> Selection:
    """Select rows of one projection.

    Args:
        pooled_NF: pooled activations.
        label_N: True for the class whose neurons are looked for.
        fitted_N: prompts that the weights are fitted on; the others measure them.
        chosen: the recipe.
        z: rows with a z-score above it and a positive weight are kept.
    """
    features_NF = pooled_NF.numpy()
    if chosen.standardise:
        features_NF = standardised(features_NF, fitted_N)
    weight_F = chosen.weigh(features_NF[fitted_N], label_N[fitted_N])
    score_F = z_scores(weight_F)
    neuron_R = np.flatnonzero((score_F > z) & (weight_F > 0))
    held_out_auroc = auroc(features_NF[~fitted_N] @ weight_F, label_N[~fitted_N])
    return Selection(torch.from_numpy(neuron_R), torch.from_numpy(score_F[neuron_R]), held_out_auroc)


def standardised(features_NF: Floats, fitted_N: Bools | None = None) -> Floats:
    """Return features with mean 0 and deviation 1 over the fitted prompts, or over all; a constant one becomes 0."""
    fitted = features_NF if fitted_N is None else features_NF[fitted_N]
    # The deviation of a constant row is rounding, not always 0.
    varies_F = np.ptp(fitted, 0) > 0
    scale_F = np.where(varies_F, 1 / np.where(varies_F, fitted.std(0), 1), 0)
    result: Floats = ((features_NF - fitted.mean(0)) * scale_F).astype(np.float32)
    return result

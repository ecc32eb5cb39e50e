"""Group found neurons: rows of one projection that act alike on the prompts will share a vector.

k-means on the activation profiles, each standardised over the prompts, so that distance is correlation; k by the
silhouette (Rousseeuw 1987), for each projection by itself.

Shape letters: R selected rows of a projection, N prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nest.controls import one_cluster, random_clusters, untied
from nest.neurons import Neurons, NeuronSet
from spider_sense.config import Settings
from spider_sense.errors import MissingExtraError, PatchError
from spider_sense.types import Site

__all__ = ["GroupConfig", "group"]

STARTS = 10
"""Runs of k-means from other centres; the one with the smallest inertia is taken."""


class GroupConfig(Settings):
    """How neurons are grouped."""

    method: Literal["kmeans", "one", "random", "untied"] = "kmeans"
    """``random`` deals the rows out among groups of the sizes that k-means would make; ``one`` and ``untied`` are one
    group a projection and one a row."""
    k_max: int = Field(default=3, ge=2)
    """Most groups of a projection."""
    k: int | None = Field(default=None, ge=1)
    """If given, this many groups in every projection with two rows for each, instead of the best up to ``k_max``."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _k_counts(self) -> Self:
        if self.k is not None and self.method in ("one", "untied"):
            raise ValueError(f"k is {self.k}, but the method {self.method} settles the number of groups; leave k out")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class _Grouping:
    cluster_R: Tensor
    silhouette: float | None
    """Mean silhouette of the rows, from -1 to 1; None of one group."""


def group(neurons: NeuronSet, config: GroupConfig) -> NeuronSet:
    """Group the neurons of every projection.

    Args:
        neurons: what was found; groups that it has are replaced.
        config: the method.

    Returns:
        The same neurons, grouped.

    Raises:
        MissingExtraError: for ``kmeans`` and ``random`` without scikit-learn.
        PatchError: for the same methods, if the rows have no profiles, or no projection has two rows for each of
            ``k`` groups.
    """
    match config.method:
        case "one":
            return one_cluster(neurons)
        case "untied":
            return untied(neurons)
        case "random":
            dealt = random_clusters(_by_profile(neurons, config), config.seed)
            facts = config.model_dump() | (dealt.manifest.grouping or {})
            return NeuronSet(dealt.manifest.model_copy(update={"grouping": facts}), dealt.sites)
    return _by_profile(neurons, config)


def _by_profile(neurons: NeuronSet, config: GroupConfig) -> NeuronSet:
    most = max(len(found.neuron_R) for found in neurons.sites.values())
    if config.k is not None and config.k > max(1, most // 2):
        raise PatchError(
            f"k is {config.k}, which takes a projection of {2 * config.k} rows, two for each group; the largest here "
            f"has {most}: name at most {max(1, most // 2)}, or find more rows with a lower z"
        )
    best = _clusterer(config)
    groupings = {site: best(_profiles(site, found)) for site, found in neurons.sites.items()}
    facts: dict[str, Any] = config.model_dump() | {
        "clusters": {str(site): int(grouping.cluster_R.max()) + 1 for site, grouping in groupings.items()},
        "silhouette": {str(site): grouping.silhouette for site, grouping in groupings.items()},
    }
    sites = {site: replace(found, cluster_R=groupings[site].cluster_R) for site, found in neurons.sites.items()}
    return NeuronSet(neurons.manifest.model_copy(update={"grouping": facts}), sites)


def _clusterer(config: GroupConfig) -> Callable[[Tensor], _Grouping]:
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error

    def split(profile_RN: Tensor, k: int) -> _Grouping:
        if len(profile_RN.unique(dim=0)) < k:
            return _one(profile_RN)
        model = KMeans(n_clusters=k, n_init=STARTS, random_state=config.seed)
        label_R = model.fit_predict(profile_RN.numpy())
        return _Grouping(torch.from_numpy(label_R).long(), float(silhouette_score(profile_RN.numpy(), label_R)))

    def best(profile_RN: Tensor) -> _Grouping:
        ks = range(2, config.k_max + 1) if config.k is None else [config.k]
        splits = [split(profile_RN, k) for k in ks if 1 < k <= len(profile_RN) // 2]
        found = [grouping for grouping in splits if grouping.silhouette is not None]
        return max(found, key=lambda grouping: grouping.silhouette or -1.0, default=_one(profile_RN))

    return best


def _one(profile_RN: Tensor) -> _Grouping:
    return _Grouping(torch.zeros(len(profile_RN), dtype=torch.int64), None)


def _profiles(site: Site, found: Neurons) -> Tensor:
    if not found.profile_RN.shape[1]:
        raise PatchError(f"the rows of {site} were drawn, not found, and have no profiles; group what was found first")
    return found.profile_RN

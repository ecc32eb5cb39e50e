"""What tuning the found neurons is compared with: other rows, other groups, no groups, one group.

Shape letters: R selected rows of a projection.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from nest.neurons import Neurons, NeuronSet
from spider_sense.errors import PatchError
from spider_sense.types import Site

__all__ = ["one_cluster", "random_clusters", "random_rows", "untied"]


def random_rows(neurons: NeuronSet, seed: int) -> NeuronSet:
    """Draw as many rows of each projection among those that were not found, in groups of the same sizes.

    Args:
        neurons: what was found.
        seed: another seed draws other rows.

    Returns:
        A set without profiles; its scores are 0.

    Raises:
        PatchError: if more than half of a projection's rows were found.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = {
        site: _drawn(site, found, neurons.manifest.modules[str(site)].rows, generator)
        for site, found in neurons.sites.items()
    }
    recipe = neurons.manifest.recipe | {"control": "random_rows", "control_seed": seed}
    return NeuronSet(neurons.manifest.model_copy(update={"recipe": recipe}), sites)


def random_clusters(neurons: NeuronSet, seed: int) -> NeuronSet:
    """Deal the rows of each projection out among groups of the same sizes.

    Raises:
        PatchError: if the set is not grouped.
    """
    generator = torch.Generator().manual_seed(seed)
    return _regrouped(neurons, "random", lambda found: _shuffled(_grouped(found), generator), seed=seed)


def untied(neurons: NeuronSet) -> NeuronSet:
    """Make every row a group of its own."""
    return _regrouped(neurons, "untied", lambda found: torch.arange(len(found.neuron_R)))


def one_cluster(neurons: NeuronSet) -> NeuronSet:
    """Make all rows of a projection one group."""
    return _regrouped(neurons, "one", lambda found: torch.zeros_like(found.neuron_R))


def _regrouped(neurons: NeuronSet, method: str, cluster: Callable[[Neurons], Tensor], **facts: Any) -> NeuronSet:
    sites = {site: replace(found, cluster_R=cluster(found)) for site, found in neurons.sites.items()}
    grouping = {"method": method, **facts}
    return NeuronSet(neurons.manifest.model_copy(update={"grouping": grouping}), sites)


def _drawn(site: Site, found: Neurons, rows: int, generator: Generator) -> Neurons:
    count = len(found.neuron_R)
    others = torch.ones(rows, dtype=torch.bool)
    others[found.neuron_R] = False
    candidates = others.nonzero()[:, 0]
    if len(candidates) < count:
        raise PatchError(
            f"{count} of the {rows} rows of {site} were found, so that as many others cannot be drawn; find fewer"
        )
    neuron_R = candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values
    cluster_R = None if found.cluster_R is None else _shuffled(found.cluster_R, generator)
    return Neurons(neuron_R, torch.zeros(count), torch.zeros(count, 0), cluster_R)


def _grouped(found: Neurons) -> Tensor:
    if found.cluster_R is None:
        raise PatchError("the set of neurons is not grouped; group it first")
    return found.cluster_R


def _shuffled(cluster_R: Tensor, generator: Generator) -> Tensor:
    return cluster_R[torch.randperm(len(cluster_R), generator=generator)]

"""Random patches for tiny models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spider_sense.experts import experts_of
from spider_sense.fingerprint import fingerprint
from spider_sense.layouts import layout_of
from spider_sense.models import LoadedModel
from spider_sense.patch import KIND, NeuronPatch, PatchManifest, PatchTarget
from spider_sense.types import Site

WIDTH, MLP_WIDTH = 32, 48


def target(rows: Sequence[int], clusters: int = 2, width: int = WIDTH, seed: int = 0) -> PatchTarget:
    """Return a patch of the given rows, whose vectors are about as long as the rows of a tiny model."""
    vectors_KD = torch.randn(clusters, width, generator=torch.Generator().manual_seed(seed)) * 0.05
    neuron_R = torch.tensor(sorted(rows))
    return PatchTarget(neuron_R, torch.arange(len(rows)) % clusters, vectors_KD)


def targets(loaded: LoadedModel, rows: int = 6, seed: int = 0) -> dict[Site, PatchTarget]:
    """Return patches of random rows of every gate (3 vectors) and up (2 vectors), in a mixture of two experts each."""
    draw = torch.Generator().manual_seed(seed)
    mixture = experts_of(loaded.model, 0)
    experts, width = ((None,), MLP_WIDTH) if mixture is None else ((1, 3), mixture.width)
    sites = [
        (Site(layer, place, expert), 3 if place == "gate" else 2)
        for place in _places(loaded)
        for layer in (0, 1)
        for expert in experts
    ]
    result = {}
    for index, (site, clusters) in enumerate(sites):
        chosen = torch.randperm(width, generator=draw)[:rows].tolist()
        result[site] = target(chosen, clusters, seed=seed * 100 + index)
    return result


def patch(
    loaded: LoadedModel, chosen: Mapping[Site, PatchTarget] | None = None, seed: int = 0, **changes: Any
) -> NeuronPatch:
    """Return a patch that is in memory only, for all projections unless told otherwise."""
    chosen = targets(loaded, seed=seed) if chosen is None else chosen
    settings = {
        "schema_version": KIND.version,
        "base": fingerprint(loaded),
        "sites": tuple(map(str, chosen)),
        "trained_parameters": sum(item.vectors_KD.numel() for item in chosen.values()),
        "trained_share": 0.01,
        "recipe": {"seed": seed},
        **changes,
    }
    return NeuronPatch(PatchManifest(**settings), chosen)


def logits(model: Any) -> Tensor:
    """Return the model's logits for two rows of ten tokens."""
    with torch.no_grad():
        output: Tensor = model(torch.arange(3, 23).view(2, 10)).logits
    return output


def weights(model: Any) -> dict[str, Tensor]:
    """Return a copy of all weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def _places(loaded: LoadedModel) -> list[Any]:
    return [place for place in layout_of(loaded.model).projections if place in ("gate", "up")]

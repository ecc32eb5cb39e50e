"""A neuron patch in a model of vLLM: an op after every patched projection, off for every row but those that are named.

A rank patches the neurons whose outputs it computes. vLLM computes gate and up of a block in one product, as a rule;
its output is the rank's share of gate and then its share of up.

Shape letters: R patched neurons of a rank, K clusters, D inputs of a projection.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sense_kernels import patch_rows
from spider_sense.errors import SiteError, SpiderSenseError
from spider_sense.live_patch import RowStrengths
from spider_sense.patch import NeuronPatch, PatchTarget, check_outside_experts
from spider_sense.serving.taps import find_blocks
from spider_sense.types import Site

__all__ = ["RowPatch"]

_MERGED = "gate_up_proj"
Share = tuple[Tensor, Tensor, Tensor]
"""[R] int64 columns of a rank's output, [R] int64 the cluster of each, [K, D] float32 vectors."""


class RowPatch:
    """Waits beside a model of vLLM, off for every row until :meth:`rows` turns it on for some of the next pass.

    Args:
        model: as vLLM has just loaded it, not yet compiled.
        patch: tuned for this model.
        alpha: its strength.
        rows: packed rows of the engine's largest step.
        device: where the model runs.

    Raises:
        PatchError: if the patch changes experts of a mixture.
        SiteError: if the model lacks a projection of the patch, or lays it out in another way.
    """

    def __init__(
        self, model: nn.Module, patch: NeuronPatch, alpha: float, rows: int, device: torch.device | str = "cpu"
    ) -> None:
        self.strengths = RowStrengths(device, rows)
        """Never grows, so a graph that was captured reads it where it lies."""
        self._from: Mapping[str, int] = {}
        self._waiting: set[str] = set()
        """Requests of the step that are patched, and whose rows nobody has named yet."""
        for projection, shares in _shares(model, patch).items():
            self._hook(projection, _joined(shares, device), alpha)

    def begin(self, patched_from: Mapping[str, int]) -> None:
        """Take the requests of the next step that are patched, and the first position at which each is."""
        self._from, self._waiting = patched_from, set(patched_from)

    def rows(self, ids: Sequence[str], starts: Sequence[int], positions: Sequence[int]) -> None:
        """Turn it on for the rows of the pass that is about to run; arguments as of ``EngineGuard.rows``."""
        patched = [
            np.arange(int(starts[place]) + max(0, self._from[name] - int(positions[place])), int(starts[place + 1]))
            for place, name in enumerate(ids)
            if name in self._from
        ]
        self._waiting.difference_update(ids)
        # All of it: a pass may be padded with rows that an earlier one named.
        self.strengths.set(len(self.strengths.tensor), np.concatenate([np.empty(0, np.int64), *patched]), 1.0)

    def rest(self) -> None:
        """Turn it off for every row, after a pass.

        Raises:
            SpiderSenseError: if a request that is patched took part in the step, and nobody said which rows are its.
        """
        self.strengths.rest()
        if self._waiting:
            raise SpiderSenseError(
                f"{', '.join(sorted(self._waiting))}: to be patched, and the engine packed its rows in a way that "
                "nobody saw; this version or option of the engine is not supported"
            )

    def _hook(self, projection: nn.Module, share: Share, alpha: float) -> None:
        (column_R, cluster_R, vectors_KD), strength_T = share, self.strengths.tensor
        if not len(column_R):
            return

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            whole = output[0] if isinstance(output, tuple) else output
            patch_rows(whole, args[0], vectors_KD, column_R, cluster_R, strength_T, alpha)

        projection.register_forward_hook(after)


def _shares(model: nn.Module, patch: NeuronPatch) -> dict[Any, list[Share]]:
    """Return what this rank patches of each projection."""
    check_outside_experts(patch.targets, "which cannot be switched on for single requests in vLLM")
    blocks, shares = find_blocks(model), dict[Any, list[Share]]()
    for site, target in patch.targets.items():
        if site.layer >= len(blocks):
            raise SiteError(f"the patch changes {site}, the model has blocks 0 to {len(blocks) - 1}")
        mlp = getattr(blocks[site.layer], "mlp", None)
        merged = getattr(mlp, _MERGED, None)
        projection = getattr(mlp, f"{site.place}_proj", None) if merged is None else merged
        shares.setdefault(projection, []).append(_share(site, target, projection, merged is not None))
    return shares


def _share(site: Site, target: PatchTarget, projection: Any, merged: bool) -> Share:
    neurons = _neurons(site, target, projection, merged)
    own = neurons // projection.tp_size
    column_R = target.neuron_R - own * projection.tp_rank
    is_own_R = (column_R >= 0) & (column_R < own)
    first = own if merged and site.place == "up" else 0
    return column_R[is_own_R] + first, target.cluster_R[is_own_R], target.vectors_KD


def _neurons(site: Site, target: PatchTarget, projection: Any, merged: bool) -> int:
    """Return how many neurons a projection has on all ranks together."""
    if projection is None or site.place not in ("gate", "up"):
        raise SiteError(
            f"{site} cannot be patched in vLLM: its block has neither mlp.{_MERGED} nor mlp.{site.place}_proj; use the "
            "patch with transformers, or another action"
        )
    if getattr(projection, "gather_output", True):
        raise SiteError(
            f"{site} cannot be patched: a {type(projection).__name__} computes it, not every rank its own neurons; use "
            "the patch with transformers, or another action"
        )
    sizes = list(getattr(projection, "output_sizes", [projection.output_size]))
    width, last = target.vectors_KD.shape[1], int(target.neuron_R[-1])
    if sizes != [sizes[0]] * (2 if merged else 1) or projection.input_size != width or last >= sizes[0]:
        raise SiteError(
            f"{site} has {projection.input_size} inputs and outputs {sizes}; the patch needs {width} inputs and "
            f"{'two equal halves of' if merged else 'one output of'} more than {last} neurons: use the patch with "
            "transformers, or another action"
        )
    return int(sizes[0])


def _joined(shares: Iterable[Share], device: torch.device | str) -> Share:
    """Return the shares of one projection as one, so that its input is read once."""
    columns, clusters, vectors = zip(*shares, strict=True)
    first = np.cumsum([0, *(len(vectors_KD) for vectors_KD in vectors)]).tolist()
    shifted = [cluster_R + start for cluster_R, start in zip(clusters, first, strict=False)]
    return torch.cat(columns).to(device), torch.cat(shifted).to(device), torch.cat(vectors).to(device)

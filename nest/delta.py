"""Low-rank additions to projections, the one form that all ways of tuning here share.

    y[t] += alpha * (x[t] @ down.T) @ up.T

NeST trains ``down`` (one vector a cluster) under a fixed 0/1 ``up`` that says which rows are in the cluster
(arXiv 2602.16835); LoRA trains both (arXiv 2106.09685); untied rows are NeST with a cluster for each row.

Shape letters: T packed rows, D inputs of a projection, F its outputs, K rank or clusters.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nest.inside_experts import Change, changed_inside
from nest.neurons import NeuronSet
from spider_sense.errors import PatchError
from spider_sense.experts import resolve_expert
from spider_sense.patch import PatchTarget
from spider_sense.sites import resolve
from spider_sense.types import Site

__all__ = ["Delta", "Deltas", "lora_deltas", "patch_targets", "shared_deltas"]


class Delta(nn.Module):
    """The addition to one projection.

    Args:
        module: the projection; its input is read and its output changed while hooks are on. Or all experts of a block.
        down_KD: float32.
        up_FK: float32; trained too if it is a parameter. Of an expert F is the rows of gate and up together.
        expert: which of the module's experts.
    """

    def __init__(
        self, module: nn.Module, down_KD: Tensor, up_FK: Tensor | nn.Parameter, expert: int | None = None
    ) -> None:
        super().__init__()
        self.expert = expert
        # A list keeps the projection out of this module's own parameters.
        self._target = [module]
        self.down_KD = nn.Parameter(down_KD)
        if isinstance(up_FK, nn.Parameter):
            self.up_FK: Tensor = up_FK
        else:
            self.register_buffer("up_FK", up_FK, persistent=False)

    @property
    def target(self) -> nn.Module:
        """The projection, or all experts of a block."""
        return self._target[0]

    @property
    def base_FD(self) -> Tensor:
        """The weight that folding changes: a view of the model's own."""
        weight = _weight(self.target, self.expert).detach()
        return weight.T if _is_transposed(self.target) else weight

    def added(self, x: Tensor) -> Tensor:
        """Return what is added at alpha 1, in the input's dtype."""
        down, up = self.down_KD.to(x.dtype), self.up_FK.to(x.dtype)
        return (x @ down.T) @ up.T


class Deltas(nn.Module):
    """The additions to a model.

    Args:
        deltas: one or several for each projection.
    """

    def __init__(self, deltas: Iterable[Delta]) -> None:
        super().__init__()
        self.deltas = nn.ModuleList(deltas)
        self.alpha = 1.0
        """Strength at which hooks and folding use them."""

    def __iter__(self) -> Iterator[Delta]:
        return iter(self.deltas)  # type: ignore[arg-type]

    def count(self) -> int:
        """Return how many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def values(self) -> dict[str, Tensor]:
        """Return copies of the trained numbers, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Take trained numbers that :meth:`values` gave."""
        for name, parameter in self.named_parameters():
            parameter.copy_(values[name])

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Add to the projections' outputs inside the block; gradients flow."""
        inside = [(delta.target, delta.expert, self._change(delta)) for delta in self if delta.expert is not None]
        with ExitStack() as stack:
            for delta in self:
                if delta.expert is None:
                    stack.callback(delta.target.register_forward_hook(self._hook(delta)).remove)
            stack.enter_context(changed_inside(inside))
            yield

    def _change(self, delta: Delta) -> Change:
        return lambda x_SD, output_SF: output_SF + self.alpha * delta.added(x_SD)

    def _hook(self, delta: Delta) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + self.alpha * delta.added(args[0])

        return add

    @contextmanager
    @torch.no_grad()
    def folded(self) -> Iterator[None]:
        """Fold the additions into the weights inside the block, and put the very same weights back after it."""
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        try:
            for delta in self:
                # Only the rows that change: experts are many, and few of their rows are tuned.
                base_FD, row_R = delta.base_FD, delta.up_FK.any(1).nonzero()[:, 0]
                before_RD = base_FD[row_R]
                kept.append((base_FD, row_R, before_RD))
                change_RD = delta.up_FK[row_R] @ delta.down_KD
                base_FD[row_R] = (before_RD.float() + self.alpha * change_RD).to(before_RD.dtype)
            yield
        finally:
            for base_FD, row_R, before_RD in reversed(kept):
                base_FD[row_R] = before_RD


def shared_deltas(model: nn.Module, neurons: NeuronSet) -> Deltas:
    """Return NeST's additions: one vector a cluster, zero at the start.

    Raises:
        PatchError: if the neurons are not grouped.
    """
    deltas = []
    for site, group in neurons.sites.items():
        if group.cluster_R is None:
            raise PatchError(f"the neurons of {site} are not grouped; run `nest group` first")
        module, start = _place(model, site)
        outputs, inputs = _shape(module, site.expert)
        up_FK = torch.zeros(outputs, int(group.cluster_R.max()) + 1)
        up_FK[start + group.neuron_R, group.cluster_R] = 1.0
        deltas.append(Delta(module, torch.zeros(up_FK.shape[1], inputs), up_FK, site.expert))
    return Deltas(deltas).to(next(model.parameters()).device)


def lora_deltas(modules: Mapping[str, nn.Module], rank: int, seed: int) -> Deltas:
    """Return LoRA's additions, as peft starts them: ``down`` uniform after Kaiming, ``up`` zero, scaling 1.

    Args:
        modules: projections by name, in the order in which the random numbers are drawn.
        rank: K.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for module in modules.values():
        outputs, inputs = _shape(module)
        bound = 1 / math.sqrt(inputs)
        down_KD = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        deltas.append(Delta(module, down_KD, nn.Parameter(torch.zeros(outputs, rank))))
    return Deltas(deltas).to(next(iter(modules.values())).weight.device)  # type: ignore[arg-type]


def patch_targets(deltas: Deltas, neurons: NeuronSet) -> dict[Site, PatchTarget]:
    """Return trained shared vectors as the targets of a patch; ``deltas`` come from :func:`shared_deltas`."""
    result = {}
    for delta, (site, group) in zip(deltas, neurons.sites.items(), strict=True):
        assert group.cluster_R is not None
        vectors_KD = delta.down_KD.detach().float().cpu().clone()
        result[site] = PatchTarget(group.neuron_R, group.cluster_R, vectors_KD)
    return result


def _place(model: nn.Module, site: Site) -> tuple[nn.Module, int]:
    """Return the module that computes a site, and the first of the site's rows in its weight."""
    if site.expert is None:
        place = resolve(model, site)
        return place.module, place.start
    experts = resolve_expert(model, site)
    return experts.module, experts.part(site).start


def _shape(module: nn.Module, expert: int | None = None) -> tuple[int, int]:
    weight = _weight(module, expert)
    outputs, inputs = reversed(weight.shape) if _is_transposed(module) else weight.shape
    return outputs, inputs


def _weight(module: nn.Module, expert: int | None = None) -> Tensor:
    weight = module.weight if expert is None else module.gate_up_proj
    assert isinstance(weight, Tensor)
    return weight if expert is None else weight[expert]


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [D, F], as by GPT-2's Conv1D."""
    return not isinstance(module, nn.Linear) and hasattr(module, "nf")

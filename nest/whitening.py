"""AdamW that steps in coordinates in which the inputs of a projection are white.

A tuned vector is compared with the inputs of its projection. What these have in common is far larger than what tells
one prompt from another, so plain steps move how much the model refuses before they move what it refuses. With
A = mean of x x^T over the inputs and A = Q L Q^T, the vector is u = Q L^(-1/2) w, and w is stepped: A is the input
factor of K-FAC (arXiv 1503.05671, section 3.1), and stepping in its eigenbasis is what SOAP does (arXiv 2409.11321).

Shape letters: K clusters or rank, D inputs of a projection, T tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nest.delta import Deltas
from nest.inside_experts import changed_inside
from nest.lessons import Lesson

__all__ = ["WhiteAdamW", "read_roots"]

_READ = 128
"""Lessons whose inputs are looked at."""
_FLOOR = 1e-3
"""Of the mean variance: directions with much less are left alone, since what is learned there is noise."""


class WhiteAdamW(torch.optim.AdamW):
    """AdamW over parameters of which some are stepped in other coordinates.

    Args:
        parameters: what is tuned.
        roots: by parameter [K, D] the coordinates [D, D], u = w @ root.T.
        options: of AdamW.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], roots: Mapping[nn.Parameter, Tensor], **options: Any
    ) -> None:
        super().__init__(parameters, **options)
        self._roots = dict(roots)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step once; moments are kept in the coordinates of the steps."""
        before = {}
        for parameter, root_DD in self._roots.items():
            if parameter.grad is not None:
                before[parameter] = parameter.clone()
                parameter.grad = parameter.grad @ root_DD
                # From zero, what AdamW leaves there is the step.
                parameter.zero_()
        result = super().step(closure)
        for group in self.param_groups:
            decayed = 1 - group["lr"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter in before:
                    parameter.copy_(before[parameter] * decayed + parameter @ self._roots[parameter].T)
        return result


@torch.no_grad()
def read_roots(model: nn.Module, deltas: Deltas, lessons: Sequence[Lesson]) -> dict[nn.Parameter, Tensor]:
    """Return the coordinates of each addition's vectors, from the base model's activations.

    They are scaled so that inputs of the same variance in every direction would leave a step as large as it is.

    Args:
        model: a transformers causal language model.
        deltas: not hooked.
        lessons: prompts with answers; some of them, evenly spread, are read.
    """
    moments = {delta: _Moment() for delta in deltas}
    # One at a time, so that no padding is read.
    with ExitStack() as stack:
        inside = []
        for delta, moment in moments.items():
            if delta.expert is None:
                stack.callback(delta.target.register_forward_hook(moment.hook).remove)
            else:
                inside.append((delta.target, delta.expert, moment.change))
        stack.enter_context(changed_inside(inside))
        device = next(model.parameters()).device
        for lesson in lessons[:: max(1, len(lessons) // _READ)]:
            model(input_ids=torch.tensor([lesson.prompt + lesson.answer], device=device), use_cache=False)
    roots: dict[nn.Parameter, Tensor] = {}
    before, root_DD = None, None
    for delta, moment in moments.items():
        # Gate and up of a block read the same.
        if moment.sum_DD is not None:
            if root_DD is None or before is None or not torch.equal(before, moment.sum_DD):
                before, root_DD = moment.sum_DD, _root(moment.sum_DD)
            roots[delta.down_KD] = root_DD
    return roots


class _Moment:
    """The sum of x x^T over the inputs of one projection; None before the first."""

    def __init__(self) -> None:
        self.sum_DD: Tensor | None = None

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._add(args[0])

    def change(self, x_SD: Tensor, output_SF: Tensor) -> Tensor:
        self._add(x_SD)
        return output_SF

    def _add(self, x: Tensor) -> None:
        x_TD = x.reshape(-1, x.shape[-1]).float()
        if len(x_TD):
            product_DD = x_TD.T @ x_TD
            self.sum_DD = product_DD if self.sum_DD is None else self.sum_DD + product_DD


def _root(sum_DD: Tensor) -> Tensor:
    variance_D, direction_DD = torch.linalg.eigh(sum_DD)
    variance_D = variance_D.clamp(min=0)
    share_D = variance_D / variance_D.mean().clamp(min=torch.finfo(torch.float32).tiny)
    root_DD: Tensor = direction_DD * (share_D.sqrt() * (1 + _FLOOR) / (share_D + _FLOOR))
    return root_DD

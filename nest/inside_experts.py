"""Changes to what experts of a mixture compute, while the model runs.

An expert has no module of its own that could be hooked, and what leaves it is no linear function of its rows. So the
experts of a block are called one by one here, as transformers' eager implementation does, with the change in between.
The weights are only looked at.

Shape letters: T packed tokens, S those of one expert, D width, K experts of a token, F rows of gate, and of up.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["Change", "changed_inside"]

Change = Callable[[Tensor, Tensor], Tensor]
"""Takes what enters an expert [S, D] and its gate and up together [S, 2F], and returns these as they go on."""


@contextmanager
def changed_inside(changes: Iterable[tuple[nn.Module, int, Change]]) -> Iterator[None]:
    """Change what experts compute inside the block; gradients flow.

    Args:
        changes: the module with all experts of a block, which of them, and what to do; several of one expert are done
            in turn, after those of a block around this one.
    """
    by_module: dict[nn.Module, dict[int, list[Change]]] = {}
    for module, expert, change in changes:
        by_module.setdefault(module, {}).setdefault(expert, []).append(change)
    with ExitStack() as stack:
        for module, own in by_module.items():
            stack.enter_context(_replaced(module, _with_outer(module, own)))
        yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    # On the instance, where accelerate may have put one of its own.
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _with_outer(module: nn.Module, own: Mapping[int, Sequence[Change]]) -> "_Forward":
    outer = module.__dict__.get("forward")
    before = outer.changes if isinstance(outer, _Forward) else {}
    return _Forward(module, {expert: [*before.get(expert, ()), *own.get(expert, ())] for expert in {*before, *own}})


@dataclass(frozen=True, slots=True, eq=False)
class _Forward:
    """The experts of a block, called one by one."""

    module: Any
    changes: Mapping[int, Sequence[Change]]

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        module, result_TD = self.module, torch.zeros_like(hidden_states)
        # A changed expert is called even with no token, so that what is trained in it has a gradient: of zeros.
        for expert in sorted({*top_k_index.unique().tolist(), *self.changes}):
            token_S, place_S = (top_k_index == expert).nonzero(as_tuple=True)
            x_SD = hidden_states[token_S]
            output_SF = linear(x_SD, module.gate_up_proj[expert])
            for change in self.changes.get(expert, ()):
                output_SF = change(x_SD, output_SF)
            gate_SF, up_SF = output_SF.chunk(2, -1)
            y_SD = linear(module.act_fn(gate_SF) * up_SF, module.down_proj[expert])
            y_SD = y_SD * top_k_weights[token_S, place_S, None]
            result_TD.index_add_(0, token_S, y_SD.to(result_TD.dtype))
        return result_TD

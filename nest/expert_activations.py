"""What the experts of a mixture say about a prompt: one number a row, the largest over the tokens routed to the expert.

The rows of an expert are multiplied once more with the tokens that the router sends there, beside the forward pass, so
that it does not matter how the model computes its experts.

Shape letters: B prompts of a batch, T padded tokens, D width, K experts of a token, F rows of gate, and of up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spider_sense.experts import Experts, resolve_expert
from spider_sense.types import Site

__all__ = ["attached", "pool_experts", "reached"]


def reached(pooled_NF: Tensor) -> Tensor:
    """Tell which prompts an expert was reached by, bool [N]: the rows that are not all -inf."""
    return (pooled_NF != -torch.inf).any(1)


def pool_experts(
    experts: Experts, sites: Sequence[Site], hidden_TD: Tensor, chosen_TK: Tensor, keep_BT: Tensor
) -> dict[Site, Tensor]:
    """Pool what some experts of a block compute of the tokens that are routed to them.

    Args:
        experts: of the block.
        sites: gate and up of some of them.
        hidden_TD: what enters the experts, tokens of the batch's rows one after another.
        chosen_TK: the experts of each token.
        keep_BT: tokens to pool over.

    Returns:
        For each site [B, F] float32; -inf where no kept token of a prompt is routed to the expert.
    """
    prompt_T = torch.arange(len(keep_BT), device=keep_BT.device).repeat_interleave(keep_BT.shape[1])
    by_expert: dict[int, list[Site]] = {}
    for site in sites:
        assert site.expert is not None
        by_expert.setdefault(site.expert, []).append(site)
    result = {}
    for expert, own in by_expert.items():
        token_S = (chosen_TK.eq(expert).any(1) & keep_BT.flatten()).nonzero()[:, 0]
        output_SF = linear(hidden_TD[token_S], experts.weight_EFD[expert]).float()
        pooled_BF = output_SF.new_full((len(keep_BT), output_SF.shape[1]), -torch.inf)
        prompt_SF = prompt_T[token_S, None].expand_as(output_SF)
        pooled_BF.scatter_reduce_(0, prompt_SF, output_SF, "amax")
        result.update({site: pooled_BF[:, experts.part(site)] for site in own})
    return result


@contextmanager
def attached(
    model: nn.Module,
    sites: Sequence[Site],
    keep: Callable[[], Tensor],
    put: Callable[[Mapping[Site, Tensor]], None],
) -> Iterator[None]:
    """Pool inside the experts of every forward pass of the block.

    Args:
        model: a mixture of experts.
        sites: gate and up of some experts.
        keep: returns which tokens of the pass to pool over, bool [B, T].
        put: takes what :func:`pool_experts` returns, once a layer and pass.

    Raises:
        SiteError: if the model has no such site.
    """
    with ExitStack() as stack:
        for layer in dict.fromkeys(site.layer for site in sites):
            own = [site for site in sites if site.layer == layer]
            found = [resolve_expert(model, site) for site in own]
            hook = _hook(found[0], own, keep, put)
            stack.callback(found[0].module.register_forward_pre_hook(hook).remove)
        yield


def _hook(
    experts: Experts, sites: Sequence[Site], keep: Callable[[], Tensor], put: Callable[[Mapping[Site, Tensor]], None]
) -> Any:
    def pool(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        put(pool_experts(experts, sites, args[0], args[1], keep()))

    return pool

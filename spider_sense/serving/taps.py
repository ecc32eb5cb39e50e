"""Taps in a model of vLLM: an op in every block that carries a site, there before the graph is compiled.

A block of vLLM returns what it computed and the residual stream before it apart; their sum is the residual stream after
the block, and the op adds them itself.

Shape letters: T packed rows, D width.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spider_sense.errors import SiteError
from spider_sense.scoring import Bank
from spider_sense.types import Site

__all__ = ["attach_taps", "find_blocks"]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of the language model, in order.

    Raises:
        SiteError: if they cannot be told.
    """
    found: dict[str, dict[int, nn.Module]] = {}
    for name, module in model.named_modules():
        match = re.fullmatch(r"(.*)\.(\d+)", name)
        if match and type(module).__name__.endswith("DecoderLayer"):
            found.setdefault(match[1], {})[int(match[2])] = module
    if len(found) != 1 or (layers := next(iter(found.values()))).keys() != set(range(len(layers))):
        raise SiteError(
            f"{type(model).__name__} has decoder layers at {sorted(found) or 'no place'}, numbered "
            f"{[sorted(layers) for layers in found.values()]}; a guard needs one run of them from 0 on. Architectures "
            "that were tried are in the README"
        )
    return [layers[index] for index in range(len(layers))]


def attach_taps(model: nn.Module, bank: Bank) -> None:
    """Score the hidden states of every site of a bank whenever the model runs.

    Args:
        model: as vLLM has just loaded it, not yet compiled.
        bank: with room for the engine's largest step.

    Raises:
        SiteError: if the model lacks a site of the bank.
    """
    blocks = find_blocks(model)
    for site in bank.sites:
        if site.layer >= len(blocks):
            raise SiteError(f"the guard reads {site}, the model has blocks 0 to {len(blocks) - 1}")
        _PLACES.get(site.place, _refuse)(blocks[site.layer], bank, site)


def _resid(block: nn.Module, bank: Bank, site: Site) -> None:
    read = bank.tap(site)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            read(output[0], output[1])
        else:
            read(output)

    block.register_forward_hook(after)


def _mlp_in(block: nn.Module, bank: Bank, site: Site) -> None:
    read = bank.tap(site)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read(args[0])

    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise SiteError(f"{type(block).__name__} has no module called mlp, so {site} cannot be read; use resid sites")
    mlp.register_forward_pre_hook(before)


def _refuse(block: nn.Module, bank: Bank, site: Site) -> None:
    raise SiteError(f"{site} cannot be read in vLLM, only {' and '.join(_PLACES)}; train a guard on such sites")


_PLACES: Mapping[str, Any] = {"resid": _resid, "mlp_in": _mlp_in}

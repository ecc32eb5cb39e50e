"""What an attacker with the weights may do to a model while it runs; every hook is removed when the block ends.

Shape letters: D width, F rows of a projection.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nest.inside_experts import Change, changed_inside
from spider_sense.errors import SiteError
from spider_sense.experts import resolve_expert
from spider_sense.layouts import is_mixture
from spider_sense.sites import layer_count, resolve
from spider_sense.types import Site

__all__ = ["direction_ablated", "neurons_off"]


@contextmanager
def direction_ablated(model: nn.Module, direction_D: Tensor) -> Iterator[None]:
    """Keep a direction out of the residual stream, at every layer and token.

    It is projected out of what enters each block, of what each norm of a block reads, and of what each block puts out,
    so neither attention nor an MLP nor the head sees it (directional ablation of Arditi et al., arXiv 2406.11717).

    Args:
        model: a transformers causal language model.
        direction_D: [D], of any length but zero.

    Raises:
        SiteError: if the architecture is not supported, or the direction has another width or is zero or not finite.
    """
    width = resolve(model, Site(0, "resid")).width
    norm = float(direction_D.float().norm())
    if direction_D.shape != (width,) or not 0 < norm < float("inf"):
        raise SiteError(
            f"a direction of shape {list(direction_D.shape)} and length {norm:g} cannot be ablated; "
            f"give {width} numbers that are finite and not all zero"
        )
    unit_D = direction_D.float() / norm
    blocks = [resolve(model, Site(layer, "resid")).module for layer in range(layer_count(model))]
    with ExitStack() as stack:
        for block in blocks:
            norms = [child for child in block.children() if "Norm" in type(child).__name__]
            for module in (block, *norms):
                stack.callback(module.register_forward_pre_hook(_on_input(unit_D), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(_on_output(unit_D)).remove)
        yield


@contextmanager
def neurons_off(model: nn.Module, rows: Mapping[Site, Tensor]) -> Iterator[None]:
    """Set the outputs of rows of gate and up projections to zero, as NeuroStrike prunes them (arXiv 2509.11864).

    Args:
        model: a transformers causal language model.
        rows: by site, int64 rows counted within gate or up where one weight holds both.

    Raises:
        SiteError: if a site is no projection, the model has no such site, or it has fewer rows.
    """
    inside = []
    with ExitStack() as stack:
        for site, row_R in rows.items():
            if site.place not in ("gate", "up"):
                raise SiteError(f"site {site} has no neurons to switch off; name gate or up projections")
            if site.expert is not None:
                experts = resolve_expert(model, site)
                _check_rows(site, row_R, experts.width)
                inside.append((experts.module, site.expert, _zero_inside(row_R + experts.part(site).start)))
                continue
            _check_dense(model, site)
            place = resolve(model, site)
            _check_rows(site, row_R, place.width)
            stack.callback(place.module.register_forward_hook(_zero(row_R + place.start)).remove)
        stack.enter_context(changed_inside(inside))
        yield


def _check_dense(model: nn.Module, site: Site) -> None:
    if site.layer < layer_count(model) and is_mixture(model, site.layer):
        raise SiteError(f"site {site}: layer {site.layer} has experts; write {site}.0 for expert 0")


def _check_rows(site: Site, row_R: Tensor, width: int) -> None:
    if len(row_R) and not 0 <= int(row_R.min()) <= int(row_R.max()) < width:
        raise SiteError(f"row {int(row_R.max())} of {site} does not exist; it has rows 0 to {width - 1}")


def _on_input(unit_D: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_without(args[0], unit_D), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _without(kwargs["hidden_states"], unit_D)}

    return hook


def _on_output(unit_D: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (_without(output[0], unit_D), *output[1:])
        return _without(output, unit_D)

    return hook


def _without(hidden: Tensor, unit_D: Tensor) -> Tensor:
    # In float32: in half precision the rest of the direction would be of the size of the rounding.
    unit_D, full = unit_D.to(hidden.device), hidden.float()
    return (full - (full @ unit_D)[..., None] * unit_D).to(hidden.dtype)


def _zero(row_R: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.index_fill(-1, row_R.to(output.device), 0.0)

    return hook


def _zero_inside(row_R: Tensor) -> Change:
    return lambda x_SD, output_SF: output_SF.index_fill(-1, row_R.to(output_SF.device), 0.0)

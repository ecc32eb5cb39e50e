"""Where the rows of one expert of a mixture are.

transformers keeps all experts of a block in one module, and their rows in one tensor: those of gate and then those of
up of expert e are ``gate_up_proj[e]``. The module is called with the hidden states [T, D], the experts that the router
chose for each token [T, K] and their weights [T, K].

Shape letters: T packed tokens, D width, K experts of a token, E experts of a block, F rows of gate, and of up.
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from spider_sense.errors import SiteError
from spider_sense.layouts import expect, find_module, is_mixture, layout_of, text_config
from spider_sense.sites import check_layer, layer_count
from spider_sense.types import Site

__all__ = ["Experts", "experts_of", "resolve_expert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The experts of one block."""

    module: nn.Module
    path: str
    """Dotted name of the module inside the model, without the wrapper of ``torch.compile``."""
    count: int
    """E."""
    width: int
    """F."""

    @property
    def weight_EFD(self) -> Tensor:
        """The rows of gate and up of every expert, [E, 2F, D]: the model's own, in its dtype."""
        return cast(Tensor, self.module.gate_up_proj)

    def part(self, site: Site) -> slice:
        """Return which of an expert's 2F rows are the site's."""
        return slice(0, self.width) if site.place == "gate" else slice(self.width, 2 * self.width)


def experts_of(model: nn.Module, layer: int) -> Experts | None:
    """Find the experts of a block; None if it has an MLP that every token passes.

    Raises:
        SiteError: if the architecture is unknown, the experts are quantised or not in one tensor, or they are not built
            as the configuration says.
    """
    if not is_mixture(model, layer):
        return None
    layout, config = layout_of(model), text_config(model)
    path = f"{layout.blocks}.{layer}.{layout.experts}"
    module = find_module(model, path)
    count = getattr(config, "num_local_experts", None) or config.num_experts
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    experts = Experts(module=module, path=path, count=count, width=width)
    _check_shape(module, path, (count, 2 * width, config.hidden_size))
    return experts


def _check_shape(module: nn.Module, path: str, configured: tuple[int, int, int]) -> None:
    weight = getattr(module, "gate_up_proj", None)
    if not isinstance(weight, Tensor):
        raise SiteError(
            f"{path} is a {type(module).__name__} that does not hold gate and up of all experts in one tensor "
            "gate_up_proj; load the model unquantised"
        )
    # Numbers that are packed, two or more into one, are integers of another shape.
    if weight.dim() != 3 or (not weight.is_floating_point() and weight.shape != configured):
        raise SiteError(
            f"{path}.gate_up_proj is {weight.dtype} {list(weight.shape)}, and unpacked it would be {list(configured)}; "
            "load the model unquantised"
        )
    for what, found, expected in zip(("experts", "rows", "inputs"), weight.shape, configured, strict=True):
        expect(f"number of {what} in {path}.gate_up_proj", found, expected)


def resolve_expert(model: nn.Module, site: Site) -> Experts:
    """Find the experts of a site that names one.

    Raises:
        SiteError: if the architecture is unknown, or has no such layer or expert.
    """
    check_layer(site, layer_count(model))
    experts = experts_of(model, site.layer)
    if experts is None:
        raise SiteError(f"site {site}: layer {site.layer} has no experts; write {site.place}.{site.layer}")
    if site.expert not in range(experts.count):
        raise SiteError(f"site {site}: layer {site.layer} has experts 0 to {experts.count - 1}")
    return experts

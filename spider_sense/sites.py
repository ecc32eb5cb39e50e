"""Where in a transformers model each site is read."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from spider_sense.errors import SiteError
from spider_sense.layouts import Projection, expect, find_module, is_mixture, layout_of, text_config, unwrap
from spider_sense.types import Place, Site

__all__ = [
    "ResolvedSite",
    "available_places",
    "check_layer",
    "layer_count",
    "resolve",
    "resolve_all",
    "shortened",
    "unwrap",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedSite:
    """A site of one model: the module to hook, and which features of its input or output to read.

    Where ``reads`` is ``output`` and a block returns a tuple, as some architectures' blocks do, the hidden states
    are element 0. The features are the last dimension of the tensor.
    """

    site: Site
    module: nn.Module
    path: str
    """Dotted name of the module inside the model, without the wrapper of ``torch.compile``."""
    reads: Literal["input", "output"]
    start: int
    """First feature; above 0 only where one projection computes gate and up together."""
    stop: int
    """One past the last feature."""

    @property
    def width(self) -> int:
        """Number of features that the site has."""
        return self.stop - self.start


def check_layer(site: Site, layers: int) -> None:
    """Check that a model of so many layers has that of a site.

    Raises:
        SiteError: if it has not.
    """
    if site.layer not in range(layers):
        raise SiteError(f"site {site}: the model has layers 0 to {layers - 1}")


def layer_count(model: nn.Module) -> int:
    """Return the number of blocks of the text model.

    Raises:
        SiteError: if the architecture is unknown, or the blocks are not as many as the configuration says.
    """
    layout = layout_of(model)
    blocks = cast(nn.ModuleList, find_module(model, layout.blocks))
    expect(f"number of blocks in {layout.blocks}", len(blocks), text_config(model).num_hidden_layers)
    return len(blocks)


@contextmanager
def shortened(model: nn.Module, layers: int) -> Iterator[None]:
    """Leave out, for the length of a block, all of a model's blocks but the first ``layers``.

    What these compute is what the whole model computes there; its logits mean nothing meanwhile, and no other thread
    may use the model.

    Raises:
        SiteError: if the architecture is unknown.
    """
    owner, _, name = layout_of(model).blocks.rpartition(".")
    stack = unwrap(find_module(model, owner))
    blocks = cast(nn.ModuleList, getattr(stack, name))
    setattr(stack, name, blocks[:layers])
    try:
        yield
    finally:
        setattr(stack, name, blocks)


def available_places(model: nn.Module) -> tuple[Place, ...]:
    """Return the places that every block of the model has, and every token passes.

    Raises:
        SiteError: if the architecture is unknown.
    """
    layout = layout_of(model)
    return ("resid", "mlp_in", *(layout.projections if layout.experts is None else ()))


def resolve(model: nn.Module, site: Site) -> ResolvedSite:
    """Find a site in a model and check that it is what the model's configuration promises.

    ``mlp_in`` is the normed input of the MLP in every architecture of the table. A site inside an expert is found by
    :func:`spider_sense.experts.resolve_expert`.

    Raises:
        SiteError: if the architecture is unknown, has no such layer or place, or is not built as its configuration
            says: number of blocks, names of modules, widths; or if the site names an expert.
    """
    layout = layout_of(model)
    _check_exists(model, site)
    block = f"{layout.blocks}.{site.layer}"
    if site.place in layout.projections:
        return _projection(model, site, f"{block}.mlp", layout.projections[site.place])
    width = text_config(model).hidden_size
    norm = f"{block}.{layout.norm}"
    expect(f"width of {norm}", cast(nn.Parameter, find_module(model, norm).weight).shape[-1], width)
    path = block if site.place == "resid" else f"{block}.mlp"
    return ResolvedSite(
        site=site,
        module=find_module(model, path),
        path=path,
        reads="output" if site.place == "resid" else "input",
        start=0,
        stop=width,
    )


def resolve_all(model: nn.Module, sites: Iterable[Site]) -> tuple[ResolvedSite, ...]:
    """Resolve several sites, in the order given.

    Raises:
        SiteError: as `resolve` does, for the first site that cannot be resolved.
    """
    return tuple(resolve(model, site) for site in sites)


def _projection(model: nn.Module, site: Site, mlp: str, projection: Projection) -> ResolvedSite:
    path = f"{mlp}.{projection.name}"
    module = find_module(model, path)
    width = _mlp_width(text_config(model))
    expect(f"output width of {path}", _out_features(module), width * projection.parts)
    start = projection.part * width
    return ResolvedSite(site=site, module=module, path=path, reads="output", start=start, stop=start + width)


def _mlp_width(config: Any) -> int:
    if hasattr(config, "intermediate_size"):
        return cast(int, config.intermediate_size)
    # GPT-2 leaves the width out where it is the usual one.
    return cast(int, config.n_inner or 4 * config.hidden_size)


def _out_features(module: nn.Module) -> int:
    # Not the weight's shape: quantised layers pack it. GPT-2's Conv1D names its output width nf.
    return cast(int, getattr(module, "nf", None) or module.out_features)


def _check_exists(model: nn.Module, site: Site) -> None:
    layers, places = layer_count(model), available_places(model)
    model_type = cast(Any, model.config).model_type
    check_layer(site, layers)
    every = f"every token can be read at resid.{site.layer} or mlp_in.{site.layer}"
    if site.expert is not None:
        raise SiteError(f"site {site} lies inside an expert, which only the tokens routed to it pass; {every}")
    if site.place not in places and is_mixture(model, site.layer):
        raise SiteError(
            f"site {site}: layer {site.layer} of this {model_type} has experts, and no {site.place!r} that every token "
            f"passes; {every}"
        )
    if site.place not in layout_of(model).projections and site.place not in places:
        raise SiteError(f"site {site}: {model_type} has no place {site.place!r}; it has: {', '.join(places)}")

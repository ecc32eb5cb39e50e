"""The table of architectures: where in a transformers model each site is read."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn

from spider_sense.errors import SiteError, nearest
from spider_sense.types import Place, Site

__all__ = [
    "ResolvedSite",
    "available_places",
    "layer_count",
    "resolve",
    "resolve_all",
    "shortened",
    "supported_architectures",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Projection:
    name: str
    """Child of the MLP."""
    part: int = 0
    parts: int = 1
    """How many equal parts the output has, and which one is meant."""


_GATED: Mapping[Place, _Projection] = {"gate": _Projection(name="gate_proj"), "up": _Projection(name="up_proj")}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where one architecture keeps its parts."""

    blocks: str = "model.layers"
    norm: str = "post_attention_layernorm"
    """Child of a block: the norm whose output enters ``mlp``. Its weight has the width of the residual stream."""
    projections: Mapping[Place, _Projection] = field(default_factory=lambda: _GATED)


_LLAMA = _Layout()
# Experts run on the tokens routed to them, so one row of gate or up per token does not exist.
_MOE = _Layout(projections={})
_LAYOUTS: Mapping[str, _Layout] = {
    "gemma2": _Layout(norm="pre_feedforward_layernorm"),
    "gemma3": _Layout(blocks="model.language_model.layers", norm="pre_feedforward_layernorm"),
    "gemma3_text": _Layout(norm="pre_feedforward_layernorm"),
    "gpt2": _Layout(blocks="transformer.h", norm="ln_2", projections={"up": _Projection(name="c_fc")}),
    "gpt_neox": _Layout(blocks="gpt_neox.layers", projections={"up": _Projection(name="dense_h_to_4h")}),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MOE,
    "phi3": _Layout(
        projections={
            "gate": _Projection(name="gate_up_proj", part=0, parts=2),
            "up": _Projection(name="gate_up_proj", part=1, parts=2),
        }
    ),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE,
    "smollm3": _LLAMA,
}


def supported_architectures() -> tuple[str, ...]:
    """Return every ``config.model_type`` that has sites, sorted."""
    return tuple(sorted(_LAYOUTS))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of ``torch.compile``, or the module itself."""
    return cast(nn.Module, getattr(model, "_orig_mod", model))


def layer_count(model: nn.Module) -> int:
    """Return the number of blocks of the text model.

    Raises:
        SiteError: if the architecture is unknown, or the blocks are not as many as the configuration says.
    """
    layout = _layout(model)
    blocks = cast(nn.ModuleList, _find(model, layout.blocks))
    _expect(f"number of blocks in {layout.blocks}", len(blocks), _text_config(model).num_hidden_layers)
    return len(blocks)


@contextmanager
def shortened(model: nn.Module, layers: int) -> Iterator[None]:
    """Leave out, for the length of a block, all of a model's blocks but the first ``layers``.

    What these compute is what the whole model computes there; its logits mean nothing meanwhile, and no other thread
    may use the model.

    Raises:
        SiteError: if the architecture is unknown.
    """
    owner, _, name = _layout(model).blocks.rpartition(".")
    stack = unwrap(_find(model, owner))
    blocks = cast(nn.ModuleList, getattr(stack, name))
    setattr(stack, name, blocks[:layers])
    try:
        yield
    finally:
        setattr(stack, name, blocks)


def available_places(model: nn.Module) -> tuple[Place, ...]:
    """Return the places that every block of the model has.

    Raises:
        SiteError: if the architecture is unknown.
    """
    return ("resid", "mlp_in", *_layout(model).projections)


def resolve(model: nn.Module, site: Site) -> ResolvedSite:
    """Find a site in a model and check that it is what the model's configuration promises.

    ``mlp_in`` is the normed input of the MLP in every architecture of the table.

    Raises:
        SiteError: if the architecture is unknown, has no such layer or place, or is not built as its configuration
            says: number of blocks, names of modules, widths.
    """
    layout = _layout(model)
    _check_exists(model, site)
    block = f"{layout.blocks}.{site.layer}"
    if site.place in layout.projections:
        return _projection(model, site, f"{block}.mlp", layout.projections[site.place])
    width = _text_config(model).hidden_size
    norm = f"{block}.{layout.norm}"
    _expect(f"width of {norm}", cast(nn.Parameter, _find(model, norm).weight).shape[-1], width)
    path = block if site.place == "resid" else f"{block}.mlp"
    return ResolvedSite(
        site=site,
        module=_find(model, path),
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


def _projection(model: nn.Module, site: Site, mlp: str, projection: _Projection) -> ResolvedSite:
    path = f"{mlp}.{projection.name}"
    module = _find(model, path)
    width = _mlp_width(_text_config(model))
    _expect(f"output width of {path}", _out_features(module), width * projection.parts)
    start = projection.part * width
    return ResolvedSite(site=site, module=module, path=path, reads="output", start=start, stop=start + width)


def _layout(model: nn.Module) -> _Layout:
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    if model_type not in _LAYOUTS:
        name = type(unwrap(model)).__name__
        raise SiteError(f"no sites for {name} of architecture {model_type!r}; {nearest(model_type, _LAYOUTS)}")
    return _LAYOUTS[model_type]


def _text_config(model: nn.Module) -> Any:
    return cast(Any, model.config).get_text_config()


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
    if site.layer not in range(layers):
        raise SiteError(f"site {site}: the model has layers 0 to {layers - 1}")
    if site.place not in places:
        raise SiteError(f"site {site}: {model_type} has no place {site.place!r}; it has: {', '.join(places)}")


def _find(model: nn.Module, path: str) -> nn.Module:
    module, seen = model, ""
    for name in path.split("."):
        # A block may be compiled by itself, inside a model that is not.
        inner = unwrap(module)
        child = inner._modules.get(name)
        if child is None:
            where = f"in {seen.rstrip('.')} of " if seen else "in "
            owner, children = type(unwrap(model)).__name__, dict(inner.named_children())
            raise SiteError(f"looked for {path}: no {name!r} {where}{owner}; {nearest(name, children)}")
        module, seen = child, f"{seen}{name}."
    return module


def _expect(what: str, found: int, configured: int) -> None:
    if found != configured:
        raise SiteError(f"{what} is {found}, but the configuration says {configured}; load the model unmodified")

"""The table of architectures: where each keeps its blocks, norms, projections and experts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from spider_sense.errors import SiteError, nearest
from spider_sense.types import Place

__all__ = [
    "LAYOUTS",
    "Layout",
    "Projection",
    "expect",
    "find_module",
    "is_mixture",
    "layout_of",
    "positions",
    "text_config",
    "unwrap",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """Where an MLP computes gate or up."""

    name: str
    """Child of the MLP."""
    part: int = 0
    parts: int = 1
    """How many equal parts the output has, and which one is meant."""


_GATED: Mapping[Place, Projection] = {"gate": Projection(name="gate_proj"), "up": Projection(name="up_proj")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where one architecture keeps its parts."""

    blocks: str = "model.layers"
    norm: str = "post_attention_layernorm"
    """Child of a block: the norm whose output enters ``mlp``. Its weight has the width of the residual stream."""
    projections: Mapping[Place, Projection] = field(default_factory=lambda: _GATED)
    """Those of an MLP that every token passes."""
    experts: str | None = None
    """Child of a block that is a mixture: the module with all of its experts. Another block of the same model may have
    an MLP in its place."""


_LLAMA = Layout()
_MOE = Layout(experts="mlp.experts")
LAYOUTS: Mapping[str, Layout] = {
    "gemma2": Layout(norm="pre_feedforward_layernorm"),
    "gemma3": Layout(blocks="model.language_model.layers", norm="pre_feedforward_layernorm"),
    "gemma3_text": Layout(norm="pre_feedforward_layernorm"),
    "gpt2": Layout(blocks="transformer.h", norm="ln_2", projections={"up": Projection(name="c_fc")}),
    "gpt_neox": Layout(blocks="gpt_neox.layers", projections={"up": Projection(name="dense_h_to_4h")}),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MOE,
    "phi3": Layout(
        projections={
            "gate": Projection(name="gate_up_proj", part=0, parts=2),
            "up": Projection(name="gate_up_proj", part=1, parts=2),
        }
    ),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE,
    "smollm3": _LLAMA,
}


def layout_of(model: nn.Module) -> Layout:
    """Return a model's layout.

    Raises:
        SiteError: if the architecture is unknown.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    if model_type not in LAYOUTS:
        name = type(unwrap(model)).__name__
        raise SiteError(f"no sites for {name} of architecture {model_type!r}; {nearest(model_type, LAYOUTS)}")
    return LAYOUTS[model_type]


def is_mixture(model: nn.Module, layer: int) -> bool:
    """Tell whether a block has experts, and no MLP that every token passes."""
    layout = layout_of(model)
    if layout.experts is None:
        return False
    owner, _, name = f"{layout.blocks}.{layer}.{layout.experts}".rpartition(".")
    return name in unwrap(find_module(model, owner))._modules


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text model."""
    return cast(Any, model.config).get_text_config()


def positions(model: nn.Module) -> int | None:
    """Return how many tokens a model can place; None if its configuration sets no limit."""
    return cast(int | None, getattr(text_config(model), "max_position_embeddings", None))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of ``torch.compile``, or the module itself."""
    return cast(nn.Module, getattr(model, "_orig_mod", model))


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module of a dotted name, looking inside compiled ones.

    Raises:
        SiteError: if there is none; with the neighbours of what is missing.
    """
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


def expect(what: str, found: int, configured: int) -> None:
    """Check a number of the model against its configuration.

    Raises:
        SiteError: with both values.
    """
    if found != configured:
        raise SiteError(f"{what} is {found}, but the configuration says {configured}; load the model unmodified")

"""A patch in the weights of a model in memory: put in, and taken out again bit for bit.

    W[rows] = W[rows] + alpha * u[cluster]        in float32, rounded once to the weight's dtype

Rounding cannot be undone by subtracting, so the original rows are kept.

Shape letters: F rows of a projection, D its inputs, R patched rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spider_sense.errors import ConfigError, PatchError
from spider_sense.experts import experts_of, resolve_expert
from spider_sense.fingerprint import fingerprint
from spider_sense.layouts import is_mixture, layout_of
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch, PatchTarget
from spider_sense.sites import layer_count, resolve, unwrap
from spider_sense.types import Site

__all__ = [
    "AppliedPatch",
    "applied_to",
    "apply_patch",
    "fitted_weights",
    "projection_FD",
    "scaled",
    "stores_transposed",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MARK = "_spider_sense_applied_patch"
"""Attribute of a patched model. On the model itself, so that a copy of it is marked too."""


def scaled(patch: NeuronPatch, alpha: float | None) -> float:
    """Return the strength to use: ``alpha``, or the one that the patch is meant for if that is None.

    Raises:
        ConfigError: if it is NaN or infinite.
    """
    strength = patch.manifest.alpha if alpha is None else alpha
    if not math.isfinite(strength):
        raise ConfigError(f"the strength alpha is {strength}; give a finite number, 1 is the patch as it was tuned")
    return strength


@dataclass(frozen=True, slots=True, eq=False)
class AppliedPatch:
    """A patch that is in a model's weights."""

    model: nn.Module
    patch: NeuronPatch
    alpha: float
    originals: Mapping[Site, Tensor]
    """[R, D] in the weight's dtype, on the CPU: the rows as they were before."""

    def revert(self) -> None:
        """Put the original rows back, bit for bit. Nothing is written if one row cannot be.

        Raises:
            PatchError: if the rows are not as the patch left them; with both values.
        """
        weights = {site: projection_FD(self.model, site) for site in self.patch.targets}
        for site, weight_FD in weights.items():
            self._check_unchanged(site, weight_FD)
        for site, weight_FD in weights.items():
            _write(weight_FD, self.patch.targets[site], self.originals[site])
        if applied_to(self.model) is self:
            delattr(unwrap(self.model), _MARK)

    def _check_unchanged(self, site: Site, weight_FD: Tensor) -> None:
        target, original_RD = self.patch.targets[site], self.originals[site]
        if weight_FD.dtype != original_RD.dtype:
            raise PatchError(
                f"{site} is {weight_FD.dtype} and was {original_RD.dtype} when patch {self.patch.digest} was applied, "
                "so its rows cannot be put back; load the model again"
            )
        found_RD, left_RD = _rows(weight_FD, target), _patched(original_RD, target, self.alpha)
        if torch.equal(found_RD, left_RD):
            return
        if torch.equal(found_RD, original_RD):
            raise PatchError(f"patch {self.patch.digest} is no longer in {site}: it was reverted already")
        row, column = (found_RD != left_RD).nonzero()[0].tolist()
        raise PatchError(
            f"{site} was changed after patch {self.patch.digest} was applied: row {target.neuron_R[row]} holds "
            f"{found_RD[row, column]} at input {column}, the patch left {left_RD[row, column]}; load the model again"
        )


def applied_to(model: nn.Module) -> AppliedPatch | None:
    """Return the patch that is in a model's weights, None if none was applied in this process."""
    return getattr(unwrap(model), _MARK, None)


def apply_patch(loaded: LoadedModel, patch: NeuronPatch, alpha: float | None = None) -> AppliedPatch:
    """Add a patch to a model's weights, in place. Nothing is written if one row does not fit.

    Args:
        loaded: the model that the patch was tuned for.
        patch: the patch.
        alpha: its strength; None is the one that it is meant for.

    Returns:
        What takes the patch out again.

    Raises:
        ConfigError: if alpha is not finite.
        MismatchError: if the patch was tuned for another model; with both values.
        PatchError: if a patch is in the model already, a weight is quantised, or rows or widths do not fit.
        SiteError: if the architecture is not supported.
    """
    strength, present = scaled(patch, alpha), applied_to(loaded.model)
    if present is not None:
        raise PatchError(
            f"patch {patch.digest} cannot be applied: patch {present.patch.digest} is in this model already; "
            "revert that one first"
        )
    weights = fitted_weights(loaded, patch)
    originals = {site: _rows(weights[site], target) for site, target in patch.targets.items()}
    patched = {site: _patched(originals[site], target, strength) for site, target in patch.targets.items()}
    for site, rows_RD in patched.items():
        _check_finite(site, rows_RD, strength)
    for site, rows_RD in patched.items():
        _write(weights[site], patch.targets[site], rows_RD)
    applied = AppliedPatch(loaded.model, patch, strength, originals)
    setattr(unwrap(loaded.model), _MARK, applied)
    return applied


def fitted_weights(loaded: LoadedModel, patch: NeuronPatch) -> dict[Site, Tensor]:
    """Check that a patch fits a model, and return the weights that it changes.

    Returns:
        For each site of the patch, :func:`projection_FD` of it.

    Raises:
        MismatchError: if the patch was tuned for another model; with both values.
        PatchError: if a weight is quantised, or rows or widths do not fit; with both values.
        SiteError: if the architecture is not supported.
    """
    # Before the fingerprints are compared: of a quantised copy they would only say that the weights are others.
    for site in patch.targets:
        if _has(loaded.model, site):
            projection_FD(loaded.model, site)
    patch.check_model(fingerprint(loaded))
    weights = {site: projection_FD(loaded.model, site) for site in patch.targets}
    for site, weight_FD in weights.items():
        _check_fits(site, weight_FD, patch.targets[site])
    return weights


def _has(model: nn.Module, site: Site) -> bool:
    if site.layer >= layer_count(model):
        return False
    if site.expert is None:
        return site.place in layout_of(model).projections and not is_mixture(model, site.layer)
    experts = experts_of(model, site.layer)
    return experts is not None and site.expert < experts.count


def projection_FD(model: nn.Module, site: Site) -> Tensor:
    """Return a view of the weight of one projection, a row for each neuron; writing to it changes the model.

    Where one weight holds gate and up, it is the half that the site names, and of all experts the one; where a weight
    is stored transposed, as GPT-2's are, it is turned.

    Raises:
        PatchError: if the site is no projection, or its weight is quantised.
        SiteError: if the model has no such site.
    """
    if site.place not in ("gate", "up"):
        raise PatchError(f"site {site} has no rows that could be patched; a patch changes gate or up projections")
    if site.expert is not None:
        experts = resolve_expert(model, site)
        weight_EFD = _plain(experts.weight_EFD, f"{experts.path}.gate_up_proj")
        return weight_EFD[site.expert, experts.part(site)]
    point = resolve(model, site)
    weight = _plain(getattr(point.module, "weight", None), f"the weight of {point.path}")
    whole_FD = weight.T if stores_transposed(point.module) else weight
    return whole_FD[point.start : point.stop]


def _plain(weight: object, name: str) -> Tensor:
    # A subclass of Tensor, such as torchao's, passes itself off as dense in its dtype.
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor or weight.dtype not in _DTYPES:
        found = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise PatchError(
            f"{name} is a {found}; a patch goes into plain weights in {allowed}: load the model unquantised"
        )
    return weight.detach()


def stores_transposed(module: nn.Module) -> bool:
    """Tell whether a projection keeps its weight as [D, F], as GPT-2's ``Conv1D`` does."""
    return isinstance(module, Conv1D)


def _rows(weight_FD: Tensor, target: PatchTarget) -> Tensor:
    return weight_FD[target.neuron_R.to(weight_FD.device)].cpu()


def _write(weight_FD: Tensor, target: PatchTarget, rows_RD: Tensor) -> None:
    weight_FD[target.neuron_R.to(weight_FD.device)] = rows_RD.to(weight_FD.device)


def _patched(original_RD: Tensor, target: PatchTarget, alpha: float) -> Tensor:
    # On the CPU whatever the model's device, so that revert computes the same bits after the model has moved.
    return (original_RD.float() + alpha * target.delta_RD().cpu()).to(original_RD.dtype)


def _check_fits(site: Site, weight_FD: Tensor, target: PatchTarget) -> None:
    (rows, width), last = weight_FD.shape, int(target.neuron_R[-1])
    if target.vectors_KD.shape[1] != width:
        raise PatchError(
            f"the patch's vectors for {site} have {target.vectors_KD.shape[1]} numbers, the projection has {width} "
            "inputs; tune the patch again for this model"
        )
    if last >= rows:
        raise PatchError(
            f"the patch changes row {last} of {site}, which has rows 0 to {rows - 1}; tune the patch again for this "
            "model"
        )


def _check_finite(site: Site, rows_RD: Tensor, alpha: float) -> None:
    if not torch.isfinite(rows_RD).all():
        raise PatchError(f"at alpha {alpha} rows of {site} leave the range of {rows_RD.dtype}; use a smaller alpha")

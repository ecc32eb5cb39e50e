"""The live patch: a neuron patch that is on for some rows of a forward pass and off for their neighbours.

Where the patch in the weights would give ``(W + alpha u) x``, this adds ``alpha (u . x)`` to the projection's output,
row by row of the batch; a row that it is off for stays as it was bit for bit. The weights are never touched.

Shape letters: T packed rows of a pass, F outputs of a projection, D its inputs, K clusters, R patched neurons.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sense_kernels import AVAILABLE, patch_rows
from spider_sense.attach import Patcher
from spider_sense.device_patch import DevicePatch
from spider_sense.errors import PatchError
from spider_sense.host_patch import HostPatch
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch, PatchTarget, check_outside_experts
from spider_sense.patching import applied_to, fitted_weights, scaled
from spider_sense.sites import resolve
from spider_sense.types import Site

__all__ = ["LivePatch", "RowStrengths"]


class RowStrengths:
    """One number for each packed row of a pass on the model's device; 0 leaves the row alone.

    Args:
        device: where the model runs.
        rows: rows to begin with; it grows.
    """

    def __init__(self, device: torch.device | str, rows: int = 64) -> None:
        self.tensor = torch.zeros(rows, device=device)
        """float32, at least as long as the pass has rows. Looked up anew in each pass, because growing replaces it."""
        self.used = False
        """Whether any row's number is not 0."""

    def set(self, total: int, rows: np.ndarray, strength: float) -> None:
        """Give some rows of the next pass a strength, and all others 0.

        Args:
            total: packed rows of the pass.
            rows: int64, indices of the rows.
            strength: their number.
        """
        if total > len(self.tensor):
            # Compiled code reads as many numbers as the pass has rows, even where all of them are 0.
            self.tensor, self.used = torch.zeros(2 * total, device=self.tensor.device), False
        if not len(rows):
            self.rest()
            return
        strength_T = torch.zeros(total, pin_memory=self.tensor.is_cuda)
        strength_T.numpy()[rows] = strength
        self.tensor[:total].copy_(strength_T, non_blocking=True)
        self.used = True

    def rest(self) -> None:
        """Leave every row alone."""
        if self.used:
            self.tensor.zero_()
            self.used = False


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """The patch of one projection on the model's device."""

    vectors_KD: Tensor
    neuron_R: Tensor
    """Columns of the module's whole output, which is gate and up together in some architectures."""
    cluster_R: Tensor


class LivePatch:
    """A patch that waits beside a model, off for every row until :meth:`set` turns it on for some.

    Args:
        loaded: the model that the patch was tuned for, as plain weights; nothing in it is changed.
        patch: the patch.
        alpha: its strength; None is the one that it is meant for.

    Raises:
        ConfigError: if alpha is not finite.
        MismatchError: if the patch was tuned for another model; with both values.
        PatchError: if a patch is in the weights already, a weight is quantised, rows or widths do not fit, or the patch
            changes experts of a mixture.
        SiteError: if the architecture is not supported.
    """

    def __init__(self, loaded: LoadedModel, patch: NeuronPatch, alpha: float | None = None) -> None:
        check_outside_experts(patch.targets, "which cannot be switched on for single requests")
        self.patch, self.alpha = patch, scaled(patch, alpha)
        applied = applied_to(loaded.model)
        if applied is not None:
            raise PatchError(
                f"patch {patch.digest} cannot be switched on for single requests: patch {applied.patch.digest} is in "
                "this model's weights for all of them; revert that one first"
            )
        fitted_weights(loaded, patch)
        device = loaded.model.device
        places = {site: resolve(loaded.model, site) for site in patch.targets}
        starts = {site: place.start for site, place in places.items()}
        self._targets = {site: _on(device, target, starts[site]) for site, target in patch.targets.items()}
        self._host = HostPatch(patch.targets, places, self.alpha) if device.type == "cpu" else None
        launches = AVAILABLE and device.type == "cuda"
        self._device = DevicePatch(patch.targets, starts, self.alpha, device) if launches else None
        self._gate = RowStrengths(device)

    @property
    def on(self) -> bool:
        """Whether it is on for any row."""
        return self._gate.used

    def set(self, total: int, rows: np.ndarray) -> None:
        """Turn it on for some rows of the next pass, and off for all others.

        Args:
            total: packed rows of the pass.
            rows: int64, indices of the rows.
        """
        self._gate.set(total, rows, 1.0)
        if self._host is not None:
            self._host.set(rows)
        if self._device is not None:
            self._device.rest()

    def rest(self) -> None:
        """Turn it off for every row."""
        self.set(0, np.empty(0, np.int64))

    def patchers(self) -> dict[Site, Patcher]:
        """Return what to call with each projection's output and input; it may be compiled."""
        return {site: self._patcher(site, target) for site, target in self._targets.items()}

    def _patcher(self, site: Site, target: _Target) -> Patcher:
        vectors_KD, neuron_R, cluster_R = target.vectors_KD, target.neuron_R, target.cluster_R

        def by_op(output_TF: Tensor, hidden_TD: Tensor) -> None:
            patch_rows(output_TF, hidden_TD, vectors_KD, neuron_R, cluster_R, self._gate.tensor, self.alpha)

        def patch(output_TF: Tensor, hidden_TD: Tensor) -> None:
            # Compiled code asks the gate on the device instead, or it would be compiled once more for the other answer.
            if torch.compiler.is_compiling():
                by_op(output_TF, hidden_TD)
            elif self._gate.used and self._device is not None:
                self._device.patch(site, output_TF, hidden_TD, self._gate.tensor)
            elif self._gate.used:
                by_op(output_TF, hidden_TD)

        return patch if self._host is None else self._host.patcher(site, by_op)


def _on(device: torch.device, target: PatchTarget, start: int) -> _Target:
    return _Target(
        vectors_KD=target.vectors_KD.to(device).contiguous(),
        neuron_R=(target.neuron_R + start).to(device),
        cluster_R=target.cluster_R.to(device),
    )

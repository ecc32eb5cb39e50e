"""The live patch on a GPU outside of compiled code, where launches are what costs.

Gate and up of a block read the same input, so one launch multiplies it with the vectors of both.

Shape letters: T packed rows of a pass, F outputs of a projection, D its inputs, K clusters, R neurons.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sense_kernels import PatchDots, launch_patch_dots, launch_patch_update
from spider_sense.patch import PatchTarget, by_layer
from spider_sense.types import Site

__all__ = ["DevicePatch"]


class DevicePatch:
    """Patches outputs in place, by the sums of ``patch_rows``.

    Args:
        targets: the patch of each projection.
        starts: where the site's rows begin in the projection's output.
        alpha: strength of the patch.
        device: where the model runs.
    """

    def __init__(
        self, targets: Mapping[Site, PatchTarget], starts: Mapping[Site, int], alpha: float, device: torch.device
    ) -> None:
        vectors, columns = by_layer(targets, starts)
        self._vectors_KD = {layer: vectors_KD.to(device) for layer, vectors_KD in vectors.items()}
        self._columns = {site: (neuron_R.to(device), row_R.to(device)) for site, (neuron_R, row_R) in columns.items()}
        self._alpha = alpha
        self._held: tuple[int, Tensor, PatchDots] | None = None

    def rest(self) -> None:
        """Forget the last pass; another gate may hold in the next."""
        self._held = None

    def patch(self, site: Site, output_TF: Tensor, hidden_TD: Tensor, gate_T: Tensor) -> None:
        """Patch the output [..., F] of a projection of the input [..., D], in the rows whose gate [T] is not 0."""
        neuron_R, cluster_R = self._columns[site]
        held = self._held
        # By identity: the tensor is held until the next block's, so no other can have taken its place.
        if held is None or held[0] != site.layer or held[1] is not hidden_TD:
            held = site.layer, hidden_TD, launch_patch_dots(hidden_TD, self._vectors_KD[site.layer], gate_T)
            self._held = held
        launch_patch_update(output_TF, held[2], neuron_R, cluster_R, gate_T, self._alpha)

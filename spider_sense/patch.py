"""The neuron patch: what tuning found, small enough to mail, and applied to one model only.

A patch adds vectors to rows of MLP projections: ``W[rows_c] += alpha * u_c``, all rows of a cluster by the same vector.
On disk it is a folder with ``patch.json`` (this module's :class:`PatchManifest`) and ``patch.safetensors``.

Shape letters: R patched rows of a projection, K clusters, D inputs of the projection.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from spider_sense.errors import PatchError, SiteError
from spider_sense.fingerprint import Fingerprint, check_match
from spider_sense.folders import ArtifactKind, VersionedRecord, sha256, short_digest
from spider_sense.types import Site

__all__ = ["KIND", "NeuronPatch", "PatchManifest", "PatchTarget", "by_layer", "check_outside_experts"]

MANIFEST, TENSORS = "patch.json", "patch.safetensors"
KIND = ArtifactKind(noun="patch", manifest=MANIFEST, version=1, maker="nest tune", again="tune", error=PatchError)


class PatchManifest(VersionedRecord):
    """``patch.json``."""

    base: Fingerprint
    """The model that the patch was tuned for; it fits no other."""
    alpha: float = Field(default=1.0, allow_inf_nan=False)
    """Strength at which it is meant to be used."""
    sites: tuple[str, ...] = Field(min_length=1)
    trained_parameters: int = Field(ge=0)
    """Numbers that tuning could change."""
    trained_share: float = Field(ge=0)
    """The same as a share of the model's parameters."""
    recipe: dict[str, Any]
    """How the neurons were found, grouped and tuned."""
    evidence: dict[str, Any] = Field(default_factory=dict)
    """What was measured with it."""
    tensors_digest: str = ""
    """SHA-256 of ``patch.safetensors``."""


@dataclass(frozen=True, slots=True, eq=False)
class PatchTarget:
    """The patch of one projection."""

    neuron_R: Tensor
    """int64, ascending: rows of the projection, counted within gate or up where one weight holds both."""
    cluster_R: Tensor
    """int64: which vector each row gets."""
    vectors_KD: Tensor
    """float32."""

    def __post_init__(self) -> None:
        rows, clusters = self.neuron_R, self.cluster_R
        if rows.dtype != torch.int64 or clusters.dtype != torch.int64 or self.vectors_KD.dtype != torch.float32:
            found = f"{rows.dtype}, {clusters.dtype} and {self.vectors_KD.dtype}"
            raise PatchError(f"rows, clusters and vectors are {found}; they must be int64, int64 and float32")
        if rows.dim() != 1 or rows.shape != clusters.shape or self.vectors_KD.dim() != 2 or not len(rows):
            shapes = f"{list(rows.shape)}, {list(clusters.shape)} and {list(self.vectors_KD.shape)}"
            raise PatchError(
                f"rows, clusters and vectors have shapes {shapes}; they must be [R], [R] and [K, D], R > 0"
            )
        if (rows.diff() <= 0).any() or rows[0] < 0:
            raise PatchError("rows of a patch must be ascending, all different and not negative")
        if clusters.min() < 0 or clusters.max() >= len(self.vectors_KD):
            raise PatchError(
                f"clusters run from {clusters.min()} to {clusters.max()}, but there are {len(self.vectors_KD)} vectors"
            )

    def delta_RD(self) -> Tensor:
        """Return what each row gets at alpha 1, float32."""
        return self.vectors_KD[self.cluster_R]


@dataclass(frozen=True, slots=True, eq=False)
class NeuronPatch:
    """A patch in memory."""

    manifest: PatchManifest
    targets: Mapping[Site, PatchTarget]

    @property
    def digest(self) -> str:
        """Short name of this patch, for audit records and cache keys; save it first."""
        return short_digest(self.manifest)

    def check_model(self, found: Fingerprint) -> None:
        """Check that the patch was tuned for this model.

        Raises:
            MismatchError: with both values.
        """
        check_match(self.manifest.base, found, "a patch fits the model that it was tuned for; tune one for this model")

    def save_pretrained(self, folder: str | Path) -> "NeuronPatch":
        """Write the patch, in the place of an older one, and return it as it is read back."""
        with KIND.staged(Path(folder)) as beside:
            save_file(_tensors(self.targets), beside / TENSORS)
            update = {"tensors_digest": sha256(beside / TENSORS), "sites": tuple(map(str, self.targets))}
            manifest = self.manifest.model_copy(update=update)
            (beside / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            # Read before it takes an older patch's place.
            return NeuronPatch.from_pretrained(beside)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "NeuronPatch":
        """Read a patch.

        Raises:
            PatchError: if a file is missing, damaged, of another version, or not the one that the manifest names.
        """
        folder = Path(folder)
        manifest = KIND.read_manifest(folder, PatchManifest)
        tensors = KIND.read_tensors(folder / TENSORS, manifest.tensors_digest)
        try:
            return cls(manifest, {Site.parse(site): _target(site, tensors) for site in manifest.sites})
        except SiteError as error:
            raise PatchError(f"{folder / MANIFEST}: sites: {error}; tune or copy the patch again") from error


def check_outside_experts(sites: Iterable[Site], why: str) -> None:
    """Check that a patch changes no expert of a mixture, for a use of it that needs a module of the projection's own.

    Raises:
        PatchError: naming the first site inside an expert, and ``why`` it is in the way.
    """
    inside = next((site for site in sites if site.expert is not None), None)
    if inside is not None:
        raise PatchError(
            f"the patch changes {inside}, a projection inside an expert, {why}; fold the patch into the weights with "
            "nest apply or nest merge"
        )


def by_layer(
    targets: Mapping[Site, PatchTarget], starts: Mapping[Site, int]
) -> tuple[dict[int, Tensor], dict[Site, tuple[Tensor, Tensor]]]:
    """Put the vectors of a layer's projections one after another.

    Args:
        targets: the patch of each projection.
        starts: where the site's rows begin in the projection's output.

    Returns:
        The vectors [K, D] of each layer, and of each site the columns [R] of its output and the vector of each [R].
    """
    vectors, columns = {}, {}
    for layer in {site.layer for site in targets}:
        own = [(site, target) for site, target in targets.items() if site.layer == layer]
        vectors[layer] = torch.cat([target.vectors_KD for _, target in own])
        first = 0
        for site, target in own:
            columns[site] = target.neuron_R + starts[site], target.cluster_R + first
            first += len(target.vectors_KD)
    return vectors, columns


def _tensors(targets: Mapping[Site, PatchTarget]) -> dict[str, Tensor]:
    return {
        f"{site}/{name}": getattr(target, field).cpu().contiguous().clone()
        for site, target in targets.items()
        for name, field in _FIELDS.items()
    }


def _target(site: str, tensors: Mapping[str, Tensor]) -> PatchTarget:
    missing = [f"{site}/{name}" for name in _FIELDS if f"{site}/{name}" not in tensors]
    if missing:
        raise PatchError(f"{TENSORS} holds no {', '.join(missing)}; tune or copy the patch again")
    return PatchTarget(*(tensors[f"{site}/{name}"] for name in _FIELDS))


_FIELDS = {"rows": "neuron_R", "clusters": "cluster_R", "vectors": "vectors_KD"}
"""Name of a tensor in the file, and the field that it fills."""

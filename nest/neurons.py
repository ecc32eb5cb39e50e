"""A set of neurons: rows of MLP projections that were found to carry a weakness, as a folder.

The folder holds ``neurons.json`` (this module's :class:`NeuronManifest`) and ``neurons.safetensors``.

Shape letters: R selected rows of a projection, N prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from spider_sense.errors import PatchError
from spider_sense.fingerprint import Fingerprint
from spider_sense.folders import ArtifactKind, Record, VersionedRecord, sha256
from spider_sense.types import Site

__all__ = ["KIND", "ModuleRecord", "NeuronManifest", "NeuronSet", "Neurons", "PromptCounts"]

MANIFEST, TENSORS = "neurons.json", "neurons.safetensors"
KIND = ArtifactKind(
    noun="set of neurons", manifest=MANIFEST, version=1, maker="nest find", again="find", error=PatchError
)


class ModuleRecord(Record):
    """What was found in one projection."""

    rows: int = Field(ge=1)
    """Rows that the projection has."""
    selected: int = Field(ge=0)
    held_out_auroc: float | None
    """How well the weights that rows were chosen by separate prompts that they were not fitted on."""


class PromptCounts(Record):
    """What the neurons were found with."""

    harmful: int
    benign: int
    utility: int = 0
    digest: str
    """SHA-256 over all of these prompts."""


class NeuronManifest(VersionedRecord):
    """``neurons.json``."""

    schema_version: int = KIND.version
    base: Fingerprint
    """The model that the neurons are rows of."""
    recipe: dict[str, Any]
    """How they were found."""
    grouping: dict[str, Any] | None = None
    """How they were grouped, if they were."""
    modules: dict[str, ModuleRecord]
    """Every projection that was looked at, by site."""
    left_out: dict[str, int] = Field(default_factory=dict, exclude_if=lambda sites: not sites)
    """Projections of experts that too few prompts of a class reach, or none of those that are fitted, with how many of
    the smaller class reach them."""
    prompts: PromptCounts
    tensors_digest: str = ""
    """SHA-256 of ``neurons.safetensors``."""


@dataclass(frozen=True, slots=True, eq=False)
class Neurons:
    """The selected rows of one projection."""

    neuron_R: Tensor
    """int64, ascending: rows, counted within gate or up where one weight holds both."""
    score_R: Tensor
    """float32: z-scores of the weights that the rows were chosen by, within the projection."""
    profile_RN: Tensor
    """float32: activation of each row on each prompt, harmful ones first, standardised over the prompts; 0 where a
    prompt does not reach the expert. Rows that were drawn rather than found have none: N is 0."""
    cluster_R: Tensor | None = None
    """int64: which group each row is in, if the set is grouped."""

    def __post_init__(self) -> None:
        rows, clusters = self.neuron_R, self.cluster_R
        if rows.dtype != torch.int64 or rows.dim() != 1 or not len(rows):
            raise PatchError(f"rows are {rows.dtype} {list(rows.shape)}; they must be int64 [R], R > 0")
        if (rows.diff() <= 0).any() or rows[0] < 0:
            raise PatchError("rows of a set of neurons must be ascending, all different and not negative")
        found = [tuple(self.score_R.shape), tuple(self.profile_RN.shape[:-1])]
        if found != [rows.shape, rows.shape]:
            raise PatchError(f"there are {len(rows)} rows, but scores {found[0]} and profiles {found[1]}")
        if clusters is not None and (clusters.dtype != torch.int64 or clusters.shape != rows.shape):
            found_clusters = f"{clusters.dtype} {list(clusters.shape)}"
            raise PatchError(f"clusters are {found_clusters}; they must be int64, one for each of {len(rows)} rows")
        if clusters is not None and clusters.min() < 0:
            raise PatchError(f"a cluster is {clusters.min()}; clusters are numbered from 0")

    @property
    def clusters(self) -> int:
        """Number of groups; 0 if the set is not grouped."""
        return 0 if self.cluster_R is None else int(self.cluster_R.max()) + 1


@dataclass(frozen=True, slots=True, eq=False)
class NeuronSet:
    """A set of neurons in memory."""

    manifest: NeuronManifest
    sites: Mapping[Site, Neurons]
    """Projections in which rows were selected."""

    @property
    def count(self) -> int:
        """Number of selected rows."""
        return sum(len(neurons.neuron_R) for neurons in self.sites.values())

    @property
    def total_rows(self) -> int:
        """Number of rows of all projections that were looked at."""
        return sum(module.rows for module in self.manifest.modules.values())

    @property
    def share(self) -> float:
        """Selected rows as a share of all."""
        return self.count / self.total_rows

    @property
    def clusters(self) -> int:
        """Number of groups in all projections: the vectors that tuning trains."""
        return sum(neurons.clusters for neurons in self.sites.values())

    def save_pretrained(self, folder: str | Path) -> "NeuronSet":
        """Write the set, in the place of an older one, and return it as it is read back: profiles in half precision."""
        with KIND.staged(Path(folder)) as beside:
            save_file(_tensors(self.sites), beside / TENSORS)
            manifest = self.manifest.model_copy(update={"tensors_digest": sha256(beside / TENSORS)})
            (beside / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return NeuronSet.from_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "NeuronSet":
        """Read a set.

        Raises:
            PatchError: if a file is missing, damaged, of another version, or not the one that the manifest names.
        """
        folder = Path(folder)
        manifest = KIND.read_manifest(folder, NeuronManifest)
        tensors = KIND.read_tensors(folder / TENSORS, manifest.tensors_digest)
        found = {site: module.selected for site, module in manifest.modules.items() if module.selected}
        return cls(manifest, {Site.parse(site): _neurons(site, tensors) for site in found})


def _tensors(sites: Mapping[Site, Neurons]) -> dict[str, Tensor]:
    tensors = {}
    for site, neurons in sites.items():
        tensors[f"{site}/rows"] = neurons.neuron_R.contiguous()
        tensors[f"{site}/scores"] = neurons.score_R.contiguous()
        tensors[f"{site}/profiles"] = neurons.profile_RN.half().contiguous()
        if neurons.cluster_R is not None:
            tensors[f"{site}/clusters"] = neurons.cluster_R.contiguous()
    return tensors


def _neurons(site: str, tensors: Mapping[str, Tensor]) -> Neurons:
    names = [f"{site}/{part}" for part in ("rows", "scores", "profiles")]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise PatchError(f"{TENSORS} holds no {', '.join(missing)}; find or copy the set of neurons again")
    rows, scores, profiles = (tensors[name] for name in names)
    return Neurons(rows, scores, profiles.float(), tensors.get(f"{site}/clusters"))

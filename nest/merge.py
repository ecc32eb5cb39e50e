"""Patches folded into a model for good: smaller on disk than a patched model, and not to be taken out again.

Where several patches change the same row, their deltas add, and the sum is rounded once.

Shape letters: R rows that some patch changes, D inputs of the projection.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from nest.apply import check_unpatched
from nest.model_folder import save_model, writing
from spider_sense.errors import ConfigError, PatchError
from spider_sense.fingerprint import Fingerprint
from spider_sense.folders import ArtifactKind, Record, VersionedRecord
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch, PatchTarget
from spider_sense.patching import apply_patch, fitted_weights, scaled
from spider_sense.types import Site

__all__ = ["KIND", "MergeManifest", "MergedPatch", "check_patches", "sum_of", "write_merged"]

KIND = ArtifactKind(
    noun="merged model",
    manifest="spider_sense_merge.json",
    version=1,
    maker="nest merge",
    again="merge",
    error=PatchError,
)


class MergedPatch(Record):
    """One of the patches."""

    digest: str
    alpha: float = Field(allow_inf_nan=False)


class MergeManifest(VersionedRecord):
    """``spider_sense_merge.json``: where a merged model comes from."""

    schema_version: int = KIND.version
    base: Fingerprint
    patches: tuple[MergedPatch, ...] = Field(min_length=1)
    rows: int = Field(ge=1)
    """Rows that at least one patch changes."""
    overlapping_rows: int = Field(ge=0)
    """Rows that more than one patch changes; they get the sum of the deltas."""


def write_merged(
    loaded: LoadedModel, patches: Sequence[NeuronPatch], out: Path, alpha: float | None = None
) -> MergeManifest:
    """Write a model with patches folded into its weights; the model in memory is as before afterwards.

    Args:
        loaded: the model that all patches were tuned for; it is written in the dtype that it has.
        patches: at least one, all different.
        out: a new folder, or a merged model, which is replaced.
        alpha: strength of every patch; None is the one that each is meant for.

    Raises:
        ConfigError: if there is no patch, alpha is not finite or the folder cannot be written.
        MismatchError: if a patch was tuned for another model; with both values.
        PatchError: if a patch is in the model already, is given twice or does not fit, or ``out`` is something else.
    """
    KIND.check_replaceable(out)
    check_patches(loaded.source, patches, alpha)
    for patch in patches:
        fitted_weights(loaded, patch)
    manifest = _manifest(patches, alpha)
    applied = apply_patch(loaded, sum_of(patches, alpha))
    try:
        with writing(KIND, out) as beside:
            save_model(loaded, beside)
            (beside / KIND.manifest).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    finally:
        applied.revert()
    return manifest


def sum_of(patches: Sequence[NeuronPatch], alpha: float | None = None) -> NeuronPatch:
    """Return the one patch that does what several of one base do together, at strength 1.

    Args:
        patches: at least one.
        alpha: strength of every patch; None is the one that each is meant for.

    Returns:
        A patch with a vector of its own for each row.
    """
    sites = sorted({site for patch in patches for site in patch.targets})
    targets = {site: _summed(site, patches, alpha) for site in sites}
    update = {"alpha": 1.0, "sites": tuple(map(str, sites)), "tensors_digest": ""}
    return NeuronPatch(patches[0].manifest.model_copy(update=update), targets)


def _summed(site: Site, patches: Sequence[NeuronPatch], alpha: float | None) -> PatchTarget:
    parts = [(patch.targets[site], scaled(patch, alpha)) for patch in patches if site in patch.targets]
    neuron_R = torch.cat([target.neuron_R for target, _ in parts]).unique()
    sum_RD = torch.zeros(len(neuron_R), parts[0][0].vectors_KD.shape[1])
    for target, strength in parts:
        sum_RD[torch.searchsorted(neuron_R, target.neuron_R)] += strength * target.delta_RD()
    return PatchTarget(neuron_R, torch.arange(len(neuron_R)), sum_RD)


def check_patches(source: str, patches: Sequence[NeuronPatch], alpha: float | None = None) -> None:
    """Check what can be told before the model is loaded.

    Args:
        source: what the model is loaded by.
        patches: what is to be merged.
        alpha: the strength asked for.

    Raises:
        ConfigError: if there is no patch or a strength is not finite.
        PatchError: if a patch is in the model already, or one is given twice.
    """
    digests = [patch.digest for patch in patches]
    if not digests:
        raise ConfigError("there is no patch to merge; name one or more with --patch")
    twice = next((digest for digest in digests if digests.count(digest) > 1), None)
    if twice is not None:
        raise PatchError(
            f"patch {twice} is given {digests.count(twice)} times among {', '.join(digests)}; name each patch once, "
            "and use --alpha for more of one"
        )
    for patch in patches:
        scaled(patch, alpha)
        check_unpatched(source, patch)


def _manifest(patches: Sequence[NeuronPatch], alpha: float | None) -> MergeManifest:
    changed = _times_changed(patch.targets for patch in patches)
    return MergeManifest(
        base=patches[0].manifest.base,
        patches=tuple(MergedPatch(digest=patch.digest, alpha=scaled(patch, alpha)) for patch in patches),
        rows=sum(len(times_R) for times_R in changed.values()),
        overlapping_rows=sum(int((times_R > 1).sum()) for times_R in changed.values()),
    )


def _times_changed(all_targets: Iterable[Mapping[Site, PatchTarget]]) -> dict[Site, Tensor]:
    """Return for each site how many patches change each of the rows that some patch changes."""
    rows: dict[Site, list[Tensor]] = {}
    for targets in all_targets:
        for site, target in targets.items():
            rows.setdefault(site, []).append(target.neuron_R)
    return {site: torch.cat(found).unique(return_counts=True)[1] for site, found in rows.items()}

"""A patched model on disk: the weights with the patch in them, and beside them what takes it out again.

``DIR/spider_sense_patch/`` holds the patch, ``originals.safetensors`` with the rows as they were, and ``applied.json``.

Shape letters: R patched rows of a projection, D its inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from nest.model_folder import save_model, weights_digest, writing
from spider_sense.errors import PatchError
from spider_sense.fingerprint import Fingerprint
from spider_sense.folders import ArtifactKind, VersionedRecord, sha256
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch
from spider_sense.patching import AppliedPatch, apply_patch
from spider_sense.types import Site

__all__ = ["FOLDER", "KIND", "AppliedManifest", "PatchedFolder", "check_unpatched", "write_patched"]

FOLDER = "spider_sense_patch"
"""Where a model's folder keeps what was done to it."""
ORIGINALS = "originals.safetensors"
KIND = ArtifactKind(
    noun="patched model",
    manifest=f"{FOLDER}/applied.json",
    version=1,
    maker="nest apply",
    again="apply",
    error=PatchError,
)


class AppliedManifest(VersionedRecord):
    """``applied.json``."""

    schema_version: int = KIND.version
    base: Fingerprint
    """The model as it was before."""
    weights_digest: str
    """SHA-256 of all its weights, see :func:`nest.model_folder.weights_digest`."""
    dtype: str
    alpha: float = Field(allow_inf_nan=False)
    patch_digest: str
    originals_digest: str
    """SHA-256 of ``originals.safetensors``."""


@dataclass(frozen=True, slots=True, eq=False)
class PatchedFolder:
    """What a patched model's folder says of the patch."""

    manifest: AppliedManifest
    patch: NeuronPatch
    originals: Mapping[Site, Tensor]
    """[R, D] in the weights' dtype: the rows as they were before."""

    @classmethod
    def read(cls, folder: Path) -> "PatchedFolder":
        """Read the patch of a patched model; the weights are not read.

        Raises:
            PatchError: if a file is missing, damaged, of another version, or not the one that the manifest names.
        """
        manifest = KIND.read_manifest(folder, AppliedManifest)
        patch = NeuronPatch.from_pretrained(folder / FOLDER)
        if patch.digest != manifest.patch_digest:
            raise PatchError(
                f"{folder / FOLDER} holds patch {patch.digest}, but {manifest.patch_digest} was applied; "
                "copy the folder again"
            )
        tensors = KIND.read_tensors(folder / FOLDER / ORIGINALS, manifest.originals_digest)
        originals = {Site.parse(name): rows_RD for name, rows_RD in tensors.items()}
        shapes = {site: target.delta_RD().shape for site, target in patch.targets.items()}
        if {site: rows_RD.shape for site, rows_RD in originals.items()} != shapes:
            raise PatchError(f"{folder / FOLDER / ORIGINALS} has other rows than the patch; copy the folder again")
        return cls(manifest, patch, originals)


def check_unpatched(source: str, patch: NeuronPatch) -> None:
    """Check that a model is no folder that a patch was applied to already.

    Raises:
        PatchError: if it is one; with the digests of both patches.
    """
    if (Path(source).expanduser() / KIND.manifest).is_file():
        present = KIND.read_manifest(Path(source).expanduser(), AppliedManifest)
        raise PatchError(
            f"patch {patch.digest} cannot be applied: patch {present.patch_digest} is in {source} already; "
            f"take it out with `nest revert {source} --out DIR`, or fold several patches at once with nest merge"
        )


def write_patched(loaded: LoadedModel, patch: NeuronPatch, out: Path, alpha: float | None = None) -> AppliedManifest:
    """Write a model with a patch in its weights; the model in memory is as before afterwards.

    Args:
        loaded: the model that the patch was tuned for; it is written in the dtype that it has.
        patch: the patch.
        out: a new folder, or a patched model, which is replaced.
        alpha: strength of the patch; None is the one that it is meant for.

    Raises:
        ConfigError: if alpha is not finite or the folder cannot be written.
        MismatchError: if the patch was tuned for another model; with both values.
        PatchError: if a patch is in the model already, the patch does not fit, or ``out`` is something else.
    """
    KIND.check_replaceable(out)
    check_unpatched(loaded.source, patch)
    before = weights_digest(loaded.model)
    applied = apply_patch(loaded, patch, alpha)
    try:
        with writing(KIND, out) as beside:
            save_model(loaded, beside)
            return _write_record(beside, applied, loaded, before)
    finally:
        applied.revert()


def _write_record(beside: Path, applied: AppliedPatch, loaded: LoadedModel, before: str) -> AppliedManifest:
    saved = applied.patch.save_pretrained(beside / FOLDER)
    originals = beside / FOLDER / ORIGINALS
    save_file({str(site): rows_RD.contiguous() for site, rows_RD in applied.originals.items()}, originals)
    manifest = AppliedManifest(
        base=applied.patch.manifest.base,
        weights_digest=before,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        alpha=applied.alpha,
        patch_digest=saved.digest,
        originals_digest=sha256(originals),
    )
    (beside / KIND.manifest).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest

"""A patched model's folder, without the patch again: every weight bit for bit as it was."""

import shutil
from pathlib import Path

from nest.apply import FOLDER, KIND, AppliedManifest, PatchedFolder
from nest.model_folder import save_weights, weights_digest, writing
from spider_sense.errors import PatchError
from spider_sense.models import LoadedModel, load_model
from spider_sense.patching import AppliedPatch

__all__ = ["write_reverted"]


def write_reverted(folder: Path, out: Path, device: str = "cpu") -> AppliedManifest:
    """Write a patched model with its original rows in place, and prove it by the digest of all weights.

    Everything but the weights, such as the tokenizer's files, is copied as it is.

    Args:
        folder: what ``nest apply`` wrote.
        out: a new folder, or a patched model, which is replaced; it may be ``folder`` itself.
        device: a torch device.

    Returns:
        The record of what was applied.

    Raises:
        ConfigError: if the model cannot be loaded or the folder cannot be written.
        PatchError: if ``folder`` is no sound patched model, its weights were changed since, or ``out`` is something
            else.
    """
    KIND.check_replaceable(out)
    patched = PatchedFolder.read(folder)
    loaded = load_model(str(folder), device=device)
    _restore(loaded, patched)
    with writing(KIND, out) as beside:
        shutil.copytree(folder, beside, ignore=_not_copied, dirs_exist_ok=True)
        save_weights(loaded, beside)
    return patched.manifest


def _restore(loaded: LoadedModel, patched: PatchedFolder) -> None:
    manifest = patched.manifest
    AppliedPatch(loaded.model, patched.patch, manifest.alpha, patched.originals).revert()
    found = weights_digest(loaded.model)
    if found != manifest.weights_digest:
        raise PatchError(
            f"with its rows put back {loaded.source} has weights of SHA-256 {found}, before the patch they had "
            f"{manifest.weights_digest}: weights outside the patch were changed since; take the model anew from "
            f"{manifest.base.base_model}"
        )


def _not_copied(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == FOLDER or ".safetensors" in name]

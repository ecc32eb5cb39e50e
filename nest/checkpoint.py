"""Interrupted tuning goes on where it stopped: what was trained, the optimiser's moments, the step. No pickle."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from spider_sense.config import Settings
from spider_sense.errors import PatchError
from spider_sense.folders import ArtifactKind, VersionedRecord, sha256

__all__ = ["load_checkpoint", "save_checkpoint"]

MANIFEST, TENSORS = "checkpoint.json", "checkpoint.safetensors"
KIND = ArtifactKind(noun="checkpoint", manifest=MANIFEST, version=1, maker="nest tune", again="tune", error=PatchError)
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class _Manifest(VersionedRecord):
    schema_version: int = KIND.version
    config: str
    """The run's settings as JSON; a run goes on only under the same ones."""
    step: int
    """Steps that were done."""
    tensors_digest: str


def save_checkpoint(
    folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, config: Settings, step: int
) -> None:
    """Write what a run needs to go on, in the place of an older checkpoint."""
    tensors = {f"value/{name}": value.detach().cpu().contiguous() for name, value in trained.named_parameters()}
    for name, parameter in trained.named_parameters():
        for moment in _MOMENTS:
            value = optimizer.state.get(parameter, {}).get(moment)
            if value is not None:
                tensors[f"{moment}/{name}"] = value.detach().cpu().contiguous()
    with KIND.staged(folder) as beside:
        save_file(tensors, beside / TENSORS)
        manifest = _Manifest(config=config.model_dump_json(), step=step, tensors_digest=sha256(beside / TENSORS))
        (beside / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_checkpoint(folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, config: Settings) -> int:
    """Put a checkpoint back, if there is one.

    Returns:
        Steps that were done; 0 without a checkpoint.

    Raises:
        PatchError: if it was made under other settings, or holds other parameters.
    """
    if not (folder / MANIFEST).is_file():
        return 0
    manifest = KIND.read_manifest(folder, _Manifest)
    if manifest.config != config.model_dump_json():
        raise PatchError(
            f"{folder} holds a run with the settings {manifest.config}, not {config.model_dump_json()}; "
            "name a new folder, or go on with the same settings"
        )
    tensors = KIND.read_tensors(folder / TENSORS, manifest.tensors_digest)
    for name, parameter in trained.named_parameters():
        value = tensors.get(f"value/{name}")
        if value is None or value.shape != parameter.shape:
            found = None if value is None else list(value.shape)
            raise PatchError(
                f"{folder}: the checkpoint holds {name} as {found}, the run has {list(parameter.shape)}; "
                "name a new folder"
            )
        parameter.copy_(value)
        state = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS if f"{moment}/{name}" in tensors}
        optimizer.state[parameter] = {key: value.to(_device(key, parameter)) for key, value in state.items()}
    return manifest.step


def _device(moment: str, parameter: torch.Tensor) -> torch.device:
    # AdamW keeps its step count on the CPU.
    return torch.device("cpu") if moment == "step" else parameter.device

"""A patch as a LoRA adapter, in the files that peft and vLLM read.

What a patch adds to a weight, ``alpha * S @ U`` with S the 0/1 matrix of which row is in which cluster, is a LoRA of
rank K already: A = U and B = alpha * S. The adapter has one rank for all modules, because vLLM reads no other kind;
where a module needs less, A and B are filled up with zeros. ``lora_alpha`` equals the rank, so that the adapter adds
B @ A as it is. Where one weight holds gate and up, so does its module, and the ranks of the two add.

Shape letters: F outputs of the module, D its inputs, K rank of the module, P rank of the adapter, R patched rows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from nest.model_folder import writing
from spider_sense.errors import PatchError
from spider_sense.fingerprint import Fingerprint
from spider_sense.folders import ArtifactKind, VersionedRecord
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch, PatchTarget, check_outside_experts
from spider_sense.patching import fitted_weights, scaled, stores_transposed
from spider_sense.sites import ResolvedSite, resolve

__all__ = ["KIND", "ExportManifest", "check_exportable", "lora_weights", "write_adapter"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KIND = ArtifactKind(
    noun="exported adapter",
    manifest="spider_sense_export.json",
    version=1,
    maker="nest export",
    again="export",
    error=PatchError,
)


class ExportManifest(VersionedRecord):
    """``spider_sense_export.json``: which patch an adapter is."""

    schema_version: int = KIND.version
    base: Fingerprint
    patch_digest: str
    alpha: float = Field(allow_inf_nan=False)
    rank: int = Field(ge=1)
    modules: tuple[str, ...] = Field(min_length=1)


def check_exportable(patch: NeuronPatch) -> None:
    """Check that an adapter can say what a patch changes; the model is not needed for it.

    Raises:
        PatchError: if the patch changes experts of a mixture.
    """
    check_outside_experts(patch.targets, "which no module of an adapter stands for")


def write_adapter(loaded: LoadedModel, patch: NeuronPatch, out: Path, alpha: float | None = None) -> ExportManifest:
    """Write a patch as a LoRA adapter; the model is only looked at.

    Args:
        loaded: the model that the patch was tuned for.
        patch: the patch.
        out: a new folder, or an exported adapter, which is replaced.
        alpha: strength of the patch; None is the one that it is meant for.

    Raises:
        ConfigError: if alpha is not finite or the folder cannot be written.
        MismatchError: if the patch was tuned for another model; with both values.
        PatchError: if the patch does not fit or changes experts of a mixture, or ``out`` is something else.
    """
    KIND.check_replaceable(out)
    check_exportable(patch)
    fitted_weights(loaded, patch)
    weights = lora_weights(loaded.model, patch, scaled(patch, alpha))
    manifest = ExportManifest(
        base=patch.manifest.base,
        patch_digest=patch.digest,
        alpha=scaled(patch, alpha),
        rank=max(len(a_KD) for a_KD, _ in weights.values()),
        modules=tuple(weights),
    )
    with writing(KIND, out) as beside:
        save_file(_tensors(weights, manifest.rank), beside / TENSORS, metadata={"format": "pt"})
        _write_json(beside / CONFIG, _config(loaded, manifest))
        _write_json(beside / KIND.manifest, manifest.model_dump(mode="json"))
    return manifest


def lora_weights(model: nn.Module, patch: NeuronPatch, alpha: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A [K, D] and B [F, K], float32, for each module that a patch changes, by its dotted name.

    ``B @ A`` is what the patch adds to the module's weight.
    """
    parts: dict[str, list[tuple[ResolvedSite, PatchTarget]]] = {}
    for site, target in sorted(patch.targets.items()):
        point = resolve(model, site)
        parts.setdefault(point.path, []).append((point, target))
    return {
        path: (torch.cat([target.vectors_KD for _, target in of]), _membership(of) * alpha)
        for path, of in parts.items()
    }


def _membership(parts: list[tuple[ResolvedSite, PatchTarget]]) -> Tensor:
    """Return S: 1 where a row of the module gets a vector, [F, K] float32."""
    point, target = parts[0]
    # Of the whole module, of which a site may be half.
    outputs = cast(Tensor, point.module.weight).numel() // target.vectors_KD.shape[1]
    columns = []
    for point, target in parts:
        part_FK = torch.zeros(outputs, len(target.vectors_KD))
        part_FK[point.start + target.neuron_R, target.cluster_R] = 1
        columns.append(part_FK)
    return torch.cat(columns, 1)


def _tensors(weights: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> dict[str, Tensor]:
    tensors = {}
    for path, (a_KD, b_FK) in weights.items():
        spare = rank - len(a_KD)
        tensors[f"base_model.model.{path}.lora_A.weight"] = pad(a_KD, (0, 0, 0, spare))
        tensors[f"base_model.model.{path}.lora_B.weight"] = pad(b_FK, (0, spare))
    return tensors


def _config(loaded: LoadedModel, manifest: ExportManifest) -> dict[str, Any]:
    return {
        "base_model_name_or_path": loaded.source,
        "bias": "none",
        "fan_in_fan_out": any(map(stores_transposed, map(loaded.model.get_submodule, manifest.modules))),
        "inference_mode": True,
        "lora_alpha": manifest.rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": manifest.rank,
        # Whole names: the last parts alone would put an adapter, of zeros, on every layer.
        "target_modules": list(manifest.modules),
        "task_type": "CAUSAL_LM",
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

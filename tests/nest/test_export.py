"""A patch as a LoRA adapter; that peft loads it is checked where peft is installed."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nest.export import KIND, ExportManifest, lora_weights, write_adapter
from spider_sense.errors import ConfigError, MismatchError, PatchError
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch
from spider_sense.patching import apply_patch, projection_FD
from spider_sense.types import Site

NAMES = ("llama", "qwen2", "gemma3_text", "gemma3", "phi3", "gpt2", "gpt_neox")


def load(tiny_model: Any, tiny_loaded: LoadedModel, name: str) -> LoadedModel:
    return LoadedModel(model=tiny_model(name), tokenizer=tiny_loaded.tokenizer, source=f"org/{name}")


@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_what_apply_does(
    tiny_model: Any, tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path, name: str
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; the extra nest has it")
    loaded = load(tiny_model, tiny_loaded, name)
    plain = tiny_patches.logits(loaded.model)
    patch = tiny_patches.patch(loaded)
    write_adapter(loaded, patch, tmp_path / "adapter", 0.7)
    adapted = peft.PeftModel.from_pretrained(deepcopy(loaded.model), tmp_path / "adapter")
    applied = apply_patch(loaded, patch, 0.7)
    expected = tiny_patches.logits(loaded.model)
    torch.testing.assert_close(tiny_patches.logits(adapted), expected, rtol=0, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(tiny_patches.logits(adapted), plain)
    applied.revert()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(tiny_patches.logits(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_peft_adapts_the_patched_modules_only(
    tiny_model: Any, tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path, name: str
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; the extra nest has it")
    loaded = load(tiny_model, tiny_loaded, name)
    patch = tiny_patches.patch(loaded, {Site(1, "gate"): tiny_patches.target([2, 5])})
    manifest = write_adapter(loaded, patch, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(loaded.model, tmp_path / "adapter")
    layers = [path for path, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert layers == [f"base_model.model.{path}" for path in manifest.modules]
    assert len(layers) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_product_is_what_the_patch_adds(
    tiny_model: Any, tiny_loaded: LoadedModel, tiny_patches: Any, name: str
) -> None:
    loaded = load(tiny_model, tiny_loaded, name)
    patch = tiny_patches.patch(loaded)
    before = {site: projection_FD(loaded.model, site).clone() for site in patch.targets}
    apply_patch(loaded, patch, 0.5)
    added = {site: projection_FD(loaded.model, site) - before[site] for site in patch.targets}
    expected = (
        [torch.cat([added[Site(layer, "gate")], added[Site(layer, "up")]]) for layer in (0, 1)]
        if name == "phi3"
        else [added[site] for site in sorted(patch.targets)]
    )
    products = [b_FK @ a_KD for a_KD, b_FK in lora_weights(loaded.model, patch, 0.5).values()]
    for product_FD, expected_FD in zip(products, expected, strict=True):
        torch.testing.assert_close(product_FD, expected_FD, rtol=0, atol=1e-6)


def test_ranks_are_filled_up_with_zeros(tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path) -> None:
    patch = tiny_patches.patch(tiny_loaded)
    manifest = write_adapter(tiny_loaded, patch, tmp_path / "adapter")
    assert manifest.rank == 3
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    up = "base_model.model.model.layers.0.mlp.up_proj"
    a_PD, b_FP = tensors[f"{up}.lora_A.weight"], tensors[f"{up}.lora_B.weight"]
    assert (a_PD.shape, b_FP.shape) == ((3, 32), (48, 3))
    assert torch.equal(a_PD[:2], patch.targets[Site(0, "up")].vectors_KD)
    assert not a_PD[2].any()
    assert not b_FP[:, 2].any()
    assert b_FP.unique().tolist() == [0, 1]
    assert b_FP.sum() == 6
    assert len(tensors) == 8


def test_the_ranks_of_a_fused_projection_add(
    tiny_model: Any, tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path
) -> None:
    loaded = load(tiny_model, tiny_loaded, "phi3")
    manifest = write_adapter(loaded, tiny_patches.patch(loaded), tmp_path / "adapter")
    assert manifest.rank == 5
    assert manifest.modules == tuple(f"model.layers.{layer}.mlp.gate_up_proj" for layer in (0, 1))
    b_FP = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.mlp.gate_up_proj.lora_B.weight"
    ]
    assert b_FP[:48, :3].sum() == b_FP[48:, 3:].sum() == 6
    assert not b_FP[:48, 3:].any()
    assert not b_FP[48:, :3].any()


def test_the_configuration_has_one_rank_and_strength_one(
    tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path
) -> None:
    patch = tiny_patches.patch(tiny_loaded, alpha=0.25)
    manifest = write_adapter(tiny_loaded, patch, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == manifest.rank
    assert config["target_modules"] == list(manifest.modules)
    assert config["base_model_name_or_path"] == "org/tiny"
    # What vLLM refuses, or does not read.
    assert not {"modules_to_save", "use_dora", "rank_pattern", "alpha_pattern"} & config.keys()
    assert KIND.read_manifest(tmp_path / "adapter", ExportManifest) == manifest
    assert (manifest.alpha, manifest.patch_digest) == (0.25, patch.digest)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.max().item() for name, value in tensors.items() if "lora_B" in name} == {0.25}


def test_exporting_leaves_the_model_alone(tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path) -> None:
    before = tiny_patches.weights(tiny_loaded.model)
    write_adapter(tiny_loaded, tiny_patches.patch(tiny_loaded), tmp_path / "adapter")
    assert all(torch.equal(value, before[name]) for name, value in tiny_loaded.model.state_dict().items())


def test_an_exported_adapter_is_replaced_and_a_trained_one_is_not(
    tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path
) -> None:
    patch: NeuronPatch = tiny_patches.patch(tiny_loaded)
    write_adapter(tiny_loaded, patch, tmp_path / "adapter")
    assert write_adapter(tiny_loaded, patch, tmp_path / "adapter", 2.0).alpha == 2.0
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "adapter_config.json").write_text("{}")
    with pytest.raises(PatchError, match="trained exists and is no exported adapter, so it is not replaced"):
        write_adapter(tiny_loaded, patch, tmp_path / "trained")


def test_what_does_not_fit_is_refused(
    tiny_loaded: LoadedModel, tiny_model: Any, tiny_patches: Any, tmp_path: Path
) -> None:
    patch = tiny_patches.patch(tiny_loaded)
    with pytest.raises(MismatchError, match="'Qwen2ForCausalLM', expected 'LlamaForCausalLM'"):
        write_adapter(load(tiny_model, tiny_loaded, "qwen2"), patch, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="alpha is nan"):
        write_adapter(tiny_loaded, patch, tmp_path / "adapter", float("nan"))
    bad = tiny_patches.patch(tiny_loaded, {Site(0, "up"): tiny_patches.target([60])})
    with pytest.raises(PatchError, match=r"row 60 of up\.0, which has rows 0 to 47"):
        write_adapter(tiny_loaded, bad, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_patch_of_experts_is_refused(
    tiny_model: Any, tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path, name: str
) -> None:
    loaded = load(tiny_model, tiny_loaded, name)
    with pytest.raises(PatchError, match=r"changes gate\.0\.1, .* no module of an adapter .* nest apply or nest merge"):
        write_adapter(loaded, tiny_patches.patch(loaded), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()

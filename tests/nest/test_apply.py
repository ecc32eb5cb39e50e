"""``nest apply`` and ``nest revert`` without the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nest.apply import FOLDER, KIND, PatchedFolder, check_unpatched, write_patched
from nest.model_folder import weights_digest
from nest.revert import write_reverted
from spider_sense.errors import ConfigError, MismatchError, PatchError
from spider_sense.folders import sha256
from spider_sense.models import LoadedModel, load_model
from spider_sense.patch import NeuronPatch
from spider_sense.patching import applied_to, apply_patch
from spider_sense.types import Site

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def base(tiny_loaded: LoadedModel, tmp_path: Path) -> LoadedModel:
    """A model that was loaded from a folder."""
    return saved(tiny_loaded, tmp_path / "base")


@pytest.fixture
def patch(base: LoadedModel, tiny_patches: Any, tmp_path: Path) -> NeuronPatch:
    built: NeuronPatch = tiny_patches.patch(base, alpha=0.5)
    return built.save_pretrained(tmp_path / "patch")


def saved(loaded: LoadedModel, folder: Path) -> LoadedModel:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return load_model(str(folder))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2", "mixtral", "qwen3_moe"])
def test_a_folder_is_patched_and_reverted_bit_exact(
    tiny_model: Any, tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    tiny = LoadedModel(model=tiny_model(name).to(dtype), tokenizer=tiny_loaded.tokenizer, source=f"org/{name}")
    loaded = saved(tiny, tmp_path / "base")
    patch = tiny_patches.patch(loaded)
    record = write_patched(loaded, patch, tmp_path / "patched", 0.7)
    assert (record.dtype, record.alpha) == (str(dtype).removeprefix("torch."), 0.7)
    assert not same(stored(tmp_path / "base"), stored(tmp_path / "patched"))
    patched = load_model(str(tmp_path / "patched"))
    apply_patch(loaded, patch, 0.7)
    torch.testing.assert_close(tiny_patches.logits(patched.model), tiny_patches.logits(loaded.model), rtol=0, atol=0)
    write_reverted(tmp_path / "patched", tmp_path / "reverted")
    assert same(stored(tmp_path / "base"), stored(tmp_path / "reverted"))


def test_a_dense_layer_of_a_mixture_is_patched_and_reverted_bit_exact(
    tiny_model: Any, tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path
) -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[0])
    loaded = saved(LoadedModel(model=model, tokenizer=tiny_loaded.tokenizer, source="org/moe"), tmp_path / "base")
    sites = [Site(0, "gate"), Site(0, "up"), Site(1, "gate", 2)]
    patch = tiny_patches.patch(loaded, dict.fromkeys(sites, tiny_patches.target([1, 9])))
    write_patched(loaded, patch, tmp_path / "patched", 0.7)
    patched = load_model(str(tmp_path / "patched"))
    apply_patch(loaded, patch, 0.7)
    torch.testing.assert_close(tiny_patches.logits(patched.model), tiny_patches.logits(loaded.model), rtol=0, atol=0)
    write_reverted(tmp_path / "patched", tmp_path / "reverted")
    assert same(stored(tmp_path / "base"), stored(tmp_path / "reverted"))


def test_the_model_in_memory_is_as_before(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    before = weights_digest(base.model)
    write_patched(base, patch, tmp_path / "out")
    assert weights_digest(base.model) == before
    assert applied_to(base.model) is None


def test_the_folder_says_what_was_applied(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    written = write_patched(base, patch, tmp_path / "out")
    read = PatchedFolder.read(tmp_path / "out")
    assert read.manifest == written
    assert read.manifest.alpha == 0.5
    assert read.manifest.patch_digest == read.patch.digest == patch.digest
    assert read.manifest.weights_digest == weights_digest(base.model)
    assert read.manifest.base == patch.manifest.base
    assert {path.name for path in (tmp_path / "out" / FOLDER).iterdir()} == {
        "applied.json",
        "originals.safetensors",
        "patch.json",
        "patch.safetensors",
    }
    assert read.originals.keys() == patch.targets.keys()


def test_a_patch_that_was_never_saved_is_recorded_as_saved(
    base: LoadedModel, tiny_patches: Any, tmp_path: Path
) -> None:
    record = write_patched(base, tiny_patches.patch(base), tmp_path / "out")
    assert NeuronPatch.from_pretrained(tmp_path / "out" / FOLDER).digest == record.patch_digest


def test_revert_copies_everything_else(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    write_patched(base, patch, tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine\n")
    record = write_reverted(tmp_path / "out", tmp_path / "back")
    assert record.patch_digest == patch.digest
    assert (tmp_path / "back" / "notes.md").read_text() == "mine\n"
    assert not (tmp_path / "back" / FOLDER).exists()
    for path in (tmp_path / "back").iterdir():
        # Weights are the base's file, byte for byte; everything else is the patched folder's.
        origin = tmp_path / ("base" if path.name == "model.safetensors" else "out") / path.name
        assert path.read_bytes() == origin.read_bytes(), path.name
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names | {"notes.md"}


def test_a_reverted_model_takes_the_patch_again(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    write_patched(base, patch, tmp_path / "out")
    write_reverted(tmp_path / "out", tmp_path / "out")
    write_patched(load_model(str(tmp_path / "out")), patch, tmp_path / "again")
    assert PatchedFolder.read(tmp_path / "again").manifest.base.base_model == patch.manifest.base.base_model


def test_a_patched_folder_is_replaced(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    write_patched(base, patch, tmp_path / "out")
    write_patched(base, patch, tmp_path / "out", 0.25)
    assert PatchedFolder.read(tmp_path / "out").manifest.alpha == 0.25


@pytest.mark.parametrize("seed", [0, 1], ids=["the same", "another"])
def test_a_patched_folder_is_no_model_to_patch(
    base: LoadedModel, patch: NeuronPatch, tiny_patches: Any, tmp_path: Path, seed: int
) -> None:
    write_patched(base, patch, tmp_path / "out")
    second = tiny_patches.patch(base, seed=seed)
    expected = f"patch {second.digest} cannot be applied: patch {patch.digest} is in {tmp_path}/out already; take it"
    with pytest.raises(PatchError, match=expected):
        check_unpatched(str(tmp_path / "out"), second)
    with pytest.raises(PatchError, match=expected):
        write_patched(load_model(str(tmp_path / "out")), second, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_another_model_is_refused(base: LoadedModel, patch: NeuronPatch, tiny_model: Any, tmp_path: Path) -> None:
    other = LoadedModel(model=tiny_model("qwen2"), tokenizer=base.tokenizer, source="org/other")
    with pytest.raises(MismatchError, match="'Qwen2ForCausalLM', expected 'LlamaForCausalLM'"):
        write_patched(other, patch, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_not_replaced(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="base exists and is no patched model, so it is not replaced"):
        write_patched(base, patch, tmp_path / "base")
    write_patched(base, patch, tmp_path / "out")
    with pytest.raises(PatchError, match="base exists and is no patched model, so it is not replaced"):
        write_reverted(tmp_path / "out", tmp_path / "base")


def test_a_folder_that_cannot_be_made_is_refused(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = weights_digest(base.model)
    with pytest.raises(ConfigError, match=r"cannot write into .*file: .*file is a file; name another folder"):
        write_patched(base, patch, tmp_path / "file" / "out")
    assert weights_digest(base.model) == before


def test_a_plain_model_cannot_be_reverted(base: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"applied\.json does not exist; name a folder that `nest apply` wrote"):
        write_reverted(Path(base.source), tmp_path / "back")


def rewrite(folder: Path, name: str, change: Any) -> None:
    """Change one tensor of a model's folder."""
    tensors = stored(folder)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_revert_refuses_rows_that_were_tuned_further(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    write_patched(base, patch, tmp_path / "out")
    rewrite(tmp_path / "out", "model.layers.0.mlp.gate_proj.weight", lambda weight: weight + 1)
    with pytest.raises(PatchError, match=rf"gate\.0 was changed after patch {patch.digest} .* holds .* the patch left"):
        write_reverted(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_revert_refuses_other_weights_that_were_changed(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    record = write_patched(base, patch, tmp_path / "out")
    rewrite(tmp_path / "out", "model.layers.0.self_attn.q_proj.weight", lambda weight: weight + 1)
    expected = f"SHA-256 [0-9a-f]{{64}}, before the patch they had {record.weights_digest}: weights outside the patch"
    with pytest.raises(PatchError, match=expected):
        write_reverted(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_damaged_originals_are_refused(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    write_patched(base, patch, tmp_path / "out")
    originals = tmp_path / "out" / FOLDER / "originals.safetensors"
    originals.write_bytes(originals.read_bytes()[:-3])
    with pytest.raises(PatchError, match=r"originals\.safetensors has SHA-256 .* the manifest says .*truncated"):
        write_reverted(tmp_path / "out", tmp_path / "back")


def test_an_exchanged_patch_is_refused(
    base: LoadedModel, patch: NeuronPatch, tiny_patches: Any, tmp_path: Path
) -> None:
    write_patched(base, patch, tmp_path / "out")
    other = tiny_patches.patch(base, seed=1).save_pretrained(tmp_path / "other")
    for name in ("patch.json", "patch.safetensors"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "out" / FOLDER / name)
    with pytest.raises(PatchError, match=f"holds patch {other.digest}, but {patch.digest} was applied"):
        PatchedFolder.read(tmp_path / "out")


def test_originals_of_other_rows_are_refused(base: LoadedModel, patch: NeuronPatch, tmp_path: Path) -> None:
    write_patched(base, patch, tmp_path / "out")
    originals = tmp_path / "out" / FOLDER / "originals.safetensors"
    save_file({name: rows[:-1].clone() for name, rows in load_file(originals).items()}, originals)
    manifest = json.loads((tmp_path / "out" / KIND.manifest).read_text())
    manifest["originals_digest"] = sha256(originals)
    (tmp_path / "out" / KIND.manifest).write_text(json.dumps(manifest))
    with pytest.raises(PatchError, match=r"originals\.safetensors has other rows than the patch"):
        PatchedFolder.read(tmp_path / "out")


def test_a_failed_save_leaves_nothing_behind(
    base: LoadedModel, patch: NeuronPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before, names = weights_digest(base.model), {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(type(base.model), "save_pretrained", full)
    with pytest.raises(ConfigError, match=r"cannot write .*: No space left on device"):
        write_patched(base, patch, tmp_path / "out")
    assert weights_digest(base.model) == before
    assert {path.name for path in tmp_path.iterdir()} == names

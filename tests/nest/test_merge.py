from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nest.apply import write_patched
from nest.merge import KIND, MergeManifest, sum_of, write_merged
from nest.model_folder import weights_digest
from spider_sense.errors import ConfigError, MismatchError, PatchError
from spider_sense.models import LoadedModel, load_model
from spider_sense.patch import NeuronPatch
from spider_sense.patching import apply_patch, projection_FD
from spider_sense.types import Site

GATE, UP = Site(0, "gate"), Site(1, "up")


@pytest.fixture
def base(tiny_loaded: LoadedModel, tmp_path: Path) -> LoadedModel:
    """A model that was loaded from a folder."""
    tiny_loaded.model.save_pretrained(tmp_path / "base")
    tiny_loaded.tokenizer.save_pretrained(tmp_path / "base")
    return load_model(str(tmp_path / "base"))


@pytest.fixture
def pair(base: LoadedModel, tiny_patches: Any) -> tuple[NeuronPatch, NeuronPatch]:
    """Two patches that share rows 3 and 4 of one projection."""
    first = {GATE: tiny_patches.target([1, 3, 4], seed=1)}
    second = {GATE: tiny_patches.target([3, 4, 9], seed=2), UP: tiny_patches.target([0, 47], seed=3)}
    return tiny_patches.patch(base, first, alpha=0.5), tiny_patches.patch(base, second, seed=1, alpha=2.0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_patch_is_folded_as_apply_does(
    tiny_model: Any, tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    loaded = LoadedModel(model=tiny_model(name).to(dtype), tokenizer=tiny_loaded.tokenizer, source=f"org/{name}")
    patch, before = tiny_patches.patch(loaded, alpha=0.5), weights_digest(loaded.model)
    write_merged(loaded, [patch], tmp_path / "out")
    assert weights_digest(loaded.model) == before
    apply_patch(loaded, patch)
    assert weights_digest(load_model(str(tmp_path / "out")).model) == weights_digest(loaded.model)


def test_overlapping_rows_get_the_sum(base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tmp_path: Path) -> None:
    record = write_merged(base, pair, tmp_path / "out")
    assert (record.rows, record.overlapping_rows) == (6, 2)
    assert [(part.digest, part.alpha) for part in record.patches] == [(pair[0].digest, 0.5), (pair[1].digest, 2.0)]
    merged = load_model(str(tmp_path / "out"))
    for site in (GATE, UP):
        expected_FD = projection_FD(base.model, site).clone()
        for patch in pair:
            if site in patch.targets:
                target = patch.targets[site]
                expected_FD[target.neuron_R] += patch.manifest.alpha * target.delta_RD()
        torch.testing.assert_close(projection_FD(merged.model, site), expected_FD, rtol=0, atol=1e-6)
        assert not torch.equal(projection_FD(merged.model, site), projection_FD(base.model, site))


def test_the_order_of_patches_does_not_matter(
    base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tmp_path: Path
) -> None:
    write_merged(base, pair, tmp_path / "one")
    write_merged(base, pair[::-1], tmp_path / "other")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_one_alpha_is_for_all(base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tmp_path: Path) -> None:
    record = write_merged(base, pair, tmp_path / "out", 0.1)
    assert [part.alpha for part in record.patches] == [0.1, 0.1]
    single = sum_of(pair[:1], 0.1).targets[GATE]
    torch.testing.assert_close(single.delta_RD(), 0.1 * pair[0].targets[GATE].delta_RD())


def test_a_merged_model_keeps_no_originals_and_says_where_it_is_from(
    base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tmp_path: Path
) -> None:
    record = write_merged(base, pair, tmp_path / "out")
    assert KIND.read_manifest(tmp_path / "out", MergeManifest) == record
    extra = {path.name for path in (tmp_path / "out").iterdir()} - {path.name for path in (tmp_path / "base").iterdir()}
    assert extra == {KIND.manifest}


def test_a_merged_model_is_replaced(base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tmp_path: Path) -> None:
    write_merged(base, pair, tmp_path / "out")
    write_merged(base, pair[:1], tmp_path / "out")
    assert len(KIND.read_manifest(tmp_path / "out", MergeManifest).patches) == 1


def test_a_merged_model_does_not_take_the_patch_again(
    base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tmp_path: Path
) -> None:
    write_merged(base, pair, tmp_path / "out")
    with pytest.raises(MismatchError, match=r"weight_digest is .*, expected"):
        write_merged(load_model(str(tmp_path / "out")), pair, tmp_path / "again")


def test_a_patch_given_twice_is_refused(
    base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tmp_path: Path
) -> None:
    one, other = (patch.digest for patch in pair)
    with pytest.raises(PatchError, match=f"patch {one} is given 2 times among {one}, {other}, {one}"):
        write_merged(base, [*pair, pair[0]], tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no patch to merge"):
        write_merged(base, [], tmp_path / "out")


def test_a_patched_model_is_refused_with_both_digests(
    base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tmp_path: Path
) -> None:
    record = write_patched(base, pair[0], tmp_path / "patched")
    patched = load_model(str(tmp_path / "patched"))
    expected = f"patch {pair[1].digest} cannot be applied: patch {record.patch_digest} is in"
    with pytest.raises(PatchError, match=expected):
        write_merged(patched, pair[1:], tmp_path / "out")


def test_patches_of_two_models_are_refused(
    base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tiny_model: Any, tiny_patches: Any, tmp_path: Path
) -> None:
    other = LoadedModel(model=tiny_model("qwen2"), tokenizer=base.tokenizer, source="org/other")
    with pytest.raises(MismatchError, match=r"made for org/other, not for .*base"):
        write_merged(base, [pair[0], tiny_patches.patch(other)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vectors_of_another_width_are_refused(
    base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tiny_patches: Any, tmp_path: Path
) -> None:
    bad = tiny_patches.patch(base, {GATE: tiny_patches.target([3], width=16)})
    with pytest.raises(PatchError, match=r"vectors for gate\.0 have 16 numbers, the projection has 32 inputs"):
        write_merged(base, [pair[0], bad], tmp_path / "out")


def test_a_folder_with_something_else_is_not_replaced(
    base: LoadedModel, pair: tuple[NeuronPatch, NeuronPatch], tmp_path: Path
) -> None:
    with pytest.raises(PatchError, match="base exists and is no merged model, so it is not replaced"):
        write_merged(base, pair, tmp_path / "base")

from pathlib import Path
from typing import Any

import pytest
import torch

from nest.apply import FOLDER, write_patched
from nest.diff import are_patches, diff_patches
from nest.model_diff import diff_models
from spider_sense.errors import ConfigError, MismatchError, PatchError
from spider_sense.models import LoadedModel, load_model
from spider_sense.patch import NeuronPatch, PatchTarget
from spider_sense.patching import apply_patch, projection_FD
from spider_sense.types import Site

GATE, UP = Site(0, "gate"), Site(1, "up")


def constant(rows: list[int], *values: float) -> PatchTarget:
    """Return a patch of width 32 whose one vector begins with the values."""
    vector_1D = torch.zeros(1, 32)
    vector_1D[0, : len(values)] = torch.tensor(values)
    return PatchTarget(torch.tensor(rows), torch.zeros(len(rows), dtype=torch.int64), vector_1D)


def other_copy(loaded: LoadedModel, tiny_model: Any, name: str = "llama", source: str = "org/copy") -> LoadedModel:
    return LoadedModel(model=tiny_model(name), tokenizer=loaded.tokenizer, source=source)


def test_rows_of_two_patches(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    a = tiny_patches.patch(tiny_loaded, {GATE: constant([1, 2, 3], 3.0, 4.0)}, alpha=2.0)
    b = tiny_patches.patch(tiny_loaded, {GATE: constant([2, 3, 8, 9], 4.0, 3.0), UP: constant([5], 1.0)}, seed=1)
    found = diff_patches(a, b)
    assert (found.a, found.b, found.same_base) == (a.digest, b.digest, True)
    gate, up = found.sites
    assert (gate.site, gate.shared, gate.only_a, gate.only_b) == ("gate.0", 2, 1, 2)
    assert (up.site, up.shared, up.only_a, up.only_b, up.cosine) == ("up.1", 0, 0, 1, None)
    # Three rows of length 2 * 5, and four of length 5.
    assert gate.norm_a == pytest.approx(10 * 3**0.5)
    assert gate.norm_b == pytest.approx(10)
    assert gate.cosine == pytest.approx(24 / 25)
    assert found.cosine == pytest.approx(2 * 48 / (10 * 3**0.5 * 101**0.5))


def test_a_patch_against_itself(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    patch = tiny_patches.patch(tiny_loaded)
    found = diff_patches(patch, patch)
    assert found.cosine == pytest.approx(1)
    assert all((item.shared, item.only_a, item.only_b) == (6, 0, 0) for item in found.sites)
    assert all(item.cosine == pytest.approx(1) for item in found.sites)


def test_opposite_patches(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    one, other = (tiny_patches.patch(tiny_loaded, alpha=alpha) for alpha in (1.0, -0.5))
    assert diff_patches(one, other).cosine == pytest.approx(-1)


def test_a_patch_of_nothing_has_no_cosine(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    found = diff_patches(*(tiny_patches.patch(tiny_loaded, {GATE: constant([1], value)}) for value in (0.0, 1.0)))
    assert found.cosine is None
    assert found.sites[0].cosine is None


def test_patches_of_two_models_are_told(tiny_loaded: LoadedModel, tiny_model: Any, tiny_patches: Any) -> None:
    other = other_copy(tiny_loaded, tiny_model, "qwen2")
    assert not diff_patches(tiny_patches.patch(tiny_loaded), tiny_patches.patch(other)).same_base


def test_patches_of_two_widths_are_refused(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    one, other = (tiny_patches.patch(tiny_loaded, {GATE: tiny_patches.target([1], width=width)}) for width in (32, 16))
    with pytest.raises(PatchError, match=r"vectors for gate\.0 have 16 and 32 numbers"):
        diff_patches(one, other)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2"])
def test_rows_of_two_models(tiny_loaded: LoadedModel, tiny_model: Any, tiny_patches: Any, name: str) -> None:
    a, b = (other_copy(tiny_loaded, tiny_model, name, source) for source in ("org/a", "org/b"))
    sites = {UP: tiny_patches.target([0, 7])} | ({} if name == "gpt2" else {GATE: tiny_patches.target([5])})
    patch = tiny_patches.patch(b, sites)
    before = projection_FD(b.model, UP).clone()
    apply_patch(b, patch, 2.0)
    found = diff_models(a, b)
    assert (found.a, found.b, found.dtype_a, found.dtype_b) == ("org/a", "org/b", "float32", "float32")
    assert found.others == ()
    assert {item.site: item.rows for item in found.projections} == {
        str(site): tuple(target.neuron_R.tolist()) for site, target in patch.targets.items()
    }
    up = next(item for item in found.projections if item.site == "up.1")
    assert up.of == len(before)
    assert up.norm == pytest.approx(float((projection_FD(b.model, UP) - before).norm()), rel=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_rows_of_experts(tiny_loaded: LoadedModel, tiny_model: Any, tiny_patches: Any, name: str) -> None:
    a, b = (other_copy(tiny_loaded, tiny_model, name, source) for source in ("org/a", "org/b"))
    patch = tiny_patches.patch(
        b, {Site(1, "gate", 3): tiny_patches.target([2]), Site(0, "up", 1): tiny_patches.target([5])}
    )
    apply_patch(b, patch, 2.0)
    found = diff_models(a, b)
    assert found.others == ()
    assert [(item.site, item.rows) for item in found.projections] == [("up.0.1", (5,)), ("gate.1.3", (2,))]


def test_what_else_differs_is_named(tiny_loaded: LoadedModel, tiny_model: Any) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(tiny_loaded.tokenizer)
    tokenizer.add_tokens(["w47"])
    tokenizer.chat_template += " "
    other = LoadedModel(model=tiny_model("llama"), tokenizer=tokenizer, source="org/other")
    with torch.no_grad():
        other.model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    found = diff_models(tiny_loaded, other)
    assert found.projections == ()
    assert found.others == ("model.layers.0.self_attn.q_proj.weight", "tokenizer", "chat template")


def test_equal_models(tiny_loaded: LoadedModel, tiny_model: Any) -> None:
    found = diff_models(tiny_loaded, other_copy(tiny_loaded, tiny_model))
    assert (found.projections, found.others) == ((), ())


def test_models_of_two_dtypes_are_compared_as_float32(tiny_loaded: LoadedModel, tiny_model: Any) -> None:
    other = other_copy(tiny_loaded, tiny_model)
    tiny_loaded.model.to(torch.bfloat16)
    other.model.to(torch.bfloat16).to(torch.float32)
    found = diff_models(tiny_loaded, other)
    assert (found.dtype_a, found.dtype_b) == ("bfloat16", "float32")
    assert (found.projections, found.others) == ((), ())


def test_models_of_two_architectures_are_refused(tiny_loaded: LoadedModel, tiny_model: Any) -> None:
    other = other_copy(tiny_loaded, tiny_model, "qwen2")
    expected = "the architecture is LlamaForCausalLM in org/tiny and Qwen2ForCausalLM in org/copy"
    with pytest.raises(MismatchError, match=expected):
        diff_models(tiny_loaded, other)


def test_models_of_two_shapes_are_refused(tiny_loaded: LoadedModel, tiny_model: Any) -> None:
    other = other_copy(tiny_loaded, tiny_model)
    other.model.lm_head = torch.nn.Linear(32, 65, bias=False)
    with pytest.raises(MismatchError, match=r"lm_head\.weight is \[64, 32\] in org/tiny and \[65, 32\] in org/copy"):
        diff_models(tiny_loaded, other)


def test_kinds_are_told_apart(tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path) -> None:
    tiny_patches.patch(tiny_loaded).save_pretrained(tmp_path / "patch")
    assert are_patches(str(tmp_path / "patch"), str(tmp_path / "patch"))
    assert not are_patches("org/a", "org/b")
    with pytest.raises(ConfigError, match=r"/patch is a patch and org/a is none; compare two patches or two models"):
        are_patches("org/a", str(tmp_path / "patch"))


def test_a_patched_folder_is_a_model_that_holds_a_patch(
    tiny_loaded: LoadedModel, tiny_patches: Any, tmp_path: Path
) -> None:
    patch = tiny_patches.patch(tiny_loaded).save_pretrained(tmp_path / "patch")
    write_patched(tiny_loaded, patch, tmp_path / "out")
    assert are_patches(str(tmp_path / "patch"), str(tmp_path / "out" / FOLDER))
    assert diff_patches(patch, NeuronPatch.from_pretrained(tmp_path / "out" / FOLDER)).cosine == pytest.approx(1)
    found = diff_models(tiny_loaded, load_model(str(tmp_path / "out")))
    assert [item.site for item in found.projections] == ["gate.0", "up.0", "gate.1", "up.1"]
    assert {len(item.rows) for item in found.projections} == {6}

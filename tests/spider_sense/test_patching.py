from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spider_sense.errors import ConfigError, MismatchError, PatchError
from spider_sense.models import LoadedModel
from spider_sense.patching import applied_to, apply_patch, fitted_weights, projection_FD, scaled
from spider_sense.types import Site

MIXTURES = ("mixtral", "qwen3_moe")
GATED = ("llama", "qwen2", "gemma3_text", "gemma3", "phi3")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def load(tiny_model: Any, tokenizer: Any, name: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return LoadedModel(model=tiny_model(name).to(dtype), tokenizer=tokenizer, source=f"org/{name}")


@pytest.fixture
def tokenizer(tiny_loaded: LoadedModel) -> Any:
    return tiny_loaded.tokenizer


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*GATED, *MIXTURES, "gpt2", "gpt_neox"])
def test_rows_get_their_vector_and_revert_is_bit_exact(
    tiny_model: Any, tokenizer: Any, tiny_patches: Any, name: str, dtype: torch.dtype
) -> None:
    loaded = load(tiny_model, tokenizer, name, dtype)
    before, patch = tiny_patches.weights(loaded.model), tiny_patches.patch(loaded)
    applied = apply_patch(loaded, patch, 0.7)
    for site, target in patch.targets.items():
        original_RD = applied.originals[site]
        expected = (original_RD.float() + 0.7 * target.vectors_KD[target.cluster_R]).to(dtype)
        found = projection_FD(loaded.model, site)[target.neuron_R]
        assert torch.equal(found, expected)
        assert not torch.equal(found, original_RD)
        assert original_RD.dtype == dtype
    assert differing(before, tiny_patches.weights(loaded.model))
    applied.revert()
    assert not differing(before, tiny_patches.weights(loaded.model))


@pytest.mark.parametrize("name", MIXTURES)
def test_only_the_rows_of_the_patched_experts_change(
    tiny_model: Any, tokenizer: Any, tiny_patches: Any, name: str
) -> None:
    loaded = load(tiny_model, tokenizer, name)
    before = tiny_patches.weights(loaded.model)
    apply_patch(loaded, tiny_patches.patch(loaded, {Site(1, "up", 2): tiny_patches.target([0, 7, 15])}))
    (changed,) = differing(before, tiny_patches.weights(loaded.model))
    assert changed == "model.layers.1.mlp.experts.gate_up_proj"
    old_EFD, new_EFD = before[changed], loaded.model.state_dict()[changed]
    width = old_EFD.shape[1] // 2
    assert (old_EFD != new_EFD).any(-1).nonzero().tolist() == [[2, width + row] for row in (0, 7, 15)]


def test_quantised_experts_are_refused(tiny_model: Any, tokenizer: Any, tiny_patches: Any) -> None:
    loaded = load(tiny_model, tokenizer, "mixtral")
    patch = tiny_patches.patch(loaded)
    experts = loaded.model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(PatchError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is a .*float8.* load the .* unquant"):
        apply_patch(loaded, patch)


@pytest.fixture
def partly_dense(tiny_model: Any, tokenizer: Any) -> LoadedModel:
    """A mixture whose first block has an MLP that every token passes."""
    model = tiny_model("qwen3_moe", mlp_only_layers=[0])
    return LoadedModel(model=model, tokenizer=tokenizer, source="org/partly-dense")


def test_a_dense_layer_of_a_mixture_is_patched_and_reverted(partly_dense: LoadedModel, tiny_patches: Any) -> None:
    before = tiny_patches.weights(partly_dense.model)
    sites = [Site(0, "gate"), Site(0, "up"), Site(1, "gate", 2)]
    applied = apply_patch(
        partly_dense, tiny_patches.patch(partly_dense, dict.fromkeys(sites, tiny_patches.target([1, 9])))
    )
    assert differing(before, tiny_patches.weights(partly_dense.model)) == {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
    }
    applied.revert()
    assert not differing(before, tiny_patches.weights(partly_dense.model))


def test_a_quantised_dense_layer_of_a_mixture_is_refused(partly_dense: LoadedModel, tiny_patches: Any) -> None:
    patch = tiny_patches.patch(partly_dense, {Site(0, "gate"): tiny_patches.target([1])})
    gate = partly_dense.model.model.layers[0].mlp.gate_proj
    gate.weight = nn.Parameter(gate.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(PatchError, match=r"layers\.0\.mlp\.gate_proj is a .*float8.* load the model unquantised"):
        apply_patch(partly_dense, patch)


@pytest.mark.parametrize("site", [Site(0, "gate", 1), Site(0, "gate", 4), Site(5, "gate", 1)])
def test_a_patch_of_experts_for_another_model_is_refused(
    tiny_model: Any, tokenizer: Any, tiny_loaded: LoadedModel, tiny_patches: Any, site: Site
) -> None:
    patch = tiny_patches.patch(load(tiny_model, tokenizer, "qwen3_moe"), {site: tiny_patches.target([1])})
    for other in (tiny_loaded, load(tiny_model, tokenizer, "mixtral")):
        with pytest.raises(MismatchError, match="a patch fits the model that it was tuned for"):
            apply_patch(other, patch)


@pytest.mark.parametrize("name", [*GATED, "gpt2"])
def test_only_the_rows_of_the_patch_change(tiny_model: Any, tokenizer: Any, tiny_patches: Any, name: str) -> None:
    loaded = load(tiny_model, tokenizer, name)
    before = tiny_patches.weights(loaded.model)
    site = Site(1, "up")
    apply_patch(loaded, tiny_patches.patch(loaded, {site: tiny_patches.target([0, 7, 40])}))
    (changed,) = differing(before, tiny_patches.weights(loaded.model))
    assert ".1.mlp." in changed
    old, new = before[changed], loaded.model.state_dict()[changed]
    rows = (old != new).any(0 if name == "gpt2" else 1).nonzero().flatten().tolist()
    # phi3 has gate's 48 rows before up's.
    assert rows == ([48, 55, 88] if name == "phi3" else [0, 7, 40])


@pytest.mark.parametrize("name", [*GATED, "gpt2", "gpt_neox"])
def test_the_site_gets_the_patch_times_its_input(tiny_model: Any, tokenizer: Any, tiny_patches: Any, name: str) -> None:
    loaded = load(tiny_model, tokenizer, name)
    patch = tiny_patches.patch(loaded, {Site(0, "up"): tiny_patches.target([2, 3, 11, 47])})
    plain = read(loaded, tiny_patches, Site(0, "up"))
    apply_patch(loaded, patch)
    patched = read(loaded, tiny_patches, Site(0, "up"))
    target = patch.targets[Site(0, "up")]
    added = torch.zeros_like(plain[1])
    added[..., target.neuron_R] = plain[0] @ target.delta_RD().T
    torch.testing.assert_close(patched[1], plain[1] + added, rtol=0, atol=1e-5)
    assert added.abs().max() > 0.01


def read(loaded: LoadedModel, tiny_patches: Any, site: Site) -> tuple[Tensor, Tensor]:
    """Return input and output of a projection."""
    from spider_sense.sites import resolve

    seen: list[tuple[Tensor, Tensor]] = []
    point = resolve(loaded.model, site)
    hook = point.module.register_forward_hook(
        lambda _module, inputs, output: seen.append((inputs[0], output[..., point.start : point.stop].clone()))
    )
    tiny_patches.logits(loaded.model)
    hook.remove()
    return seen[0]


def test_none_is_the_alpha_of_the_manifest(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    patch = tiny_patches.patch(tiny_loaded, alpha=0.25)
    assert scaled(patch, None) == 0.25
    assert scaled(patch, 2.0) == 2.0
    applied = apply_patch(tiny_loaded, patch)
    assert applied.alpha == 0.25
    first = tiny_patches.weights(tiny_loaded.model)
    applied.revert()
    apply_patch(tiny_loaded, patch, 0.25)
    assert not differing(first, tiny_patches.weights(tiny_loaded.model))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(tiny_loaded: LoadedModel, tiny_patches: Any, alpha: float) -> None:
    with pytest.raises(ConfigError, match=rf"alpha is {alpha}; give a finite number"):
        apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded), alpha)
    assert applied_to(tiny_loaded.model) is None


@pytest.mark.parametrize("seed", [0, 1], ids=["the same", "another"])
def test_a_second_patch_is_refused_with_both_digests(tiny_loaded: LoadedModel, tiny_patches: Any, seed: int) -> None:
    first, second = tiny_patches.patch(tiny_loaded), tiny_patches.patch(tiny_loaded, seed=seed)
    applied = apply_patch(tiny_loaded, first)
    assert applied_to(tiny_loaded.model) is applied
    before = tiny_patches.weights(tiny_loaded.model)
    with pytest.raises(PatchError, match=f"patch {second.digest} cannot be applied: patch {first.digest} is in"):
        apply_patch(tiny_loaded, second)
    assert not differing(before, tiny_patches.weights(tiny_loaded.model))
    applied.revert()
    assert applied_to(tiny_loaded.model) is None
    apply_patch(tiny_loaded, second).revert()


def test_a_copy_of_a_patched_model_is_patched(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    before = tiny_patches.weights(tiny_loaded.model)
    apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded))
    copy = deepcopy(tiny_loaded.model)
    applied = applied_to(copy)
    assert applied is not None
    assert applied.model is copy
    applied.revert()
    assert not differing(before, tiny_patches.weights(copy))
    assert differing(before, tiny_patches.weights(tiny_loaded.model))


def test_a_patch_is_seen_through_the_wrapper_of_compile(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    patch = tiny_patches.patch(tiny_loaded)
    compiled: Any = torch.compile(tiny_loaded.model, backend="eager")
    wrapped = LoadedModel(model=compiled, tokenizer=tiny_loaded.tokenizer, source=tiny_loaded.source)
    applied = apply_patch(wrapped, patch)
    assert applied_to(tiny_loaded.model) is applied
    applied.revert()
    assert applied_to(compiled) is None


def test_another_model_is_refused_with_both_values(
    tiny_loaded: LoadedModel, tiny_model: Any, tokenizer: Any, tiny_patches: Any
) -> None:
    patch = tiny_patches.patch(tiny_loaded)
    other = load(tiny_model, tokenizer, "qwen2")
    expected = r"made for org/tiny, not for org/qwen2: .*'Qwen2ForCausalLM', expected 'LlamaForCausalLM'.*tune one for"
    with pytest.raises(MismatchError, match=expected):
        apply_patch(other, patch)
    gpt2 = load(tiny_model, tokenizer, "gpt2")
    with pytest.raises(MismatchError, match="'GPT2LMHeadModel', expected 'LlamaForCausalLM'"):
        apply_patch(gpt2, patch)


def test_other_weights_are_refused_with_both_digests(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    patch = tiny_patches.patch(tiny_loaded)
    with torch.no_grad():
        tiny_loaded.model.lm_head.weight.mul_(2)
    expected = f"weight_digest is '[0-9a-f]{{64}}', expected '{patch.manifest.base.weight_digest}'"
    with pytest.raises(MismatchError, match=expected):
        apply_patch(tiny_loaded, patch)


def test_vectors_of_another_width_are_refused_with_both(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    good, bad = tiny_patches.target([1]), tiny_patches.target([1], width=31)
    patch = tiny_patches.patch(tiny_loaded, {Site(0, "gate"): good, Site(1, "gate"): bad})
    before = tiny_patches.weights(tiny_loaded.model)
    with pytest.raises(PatchError, match=r"vectors for gate\.1 have 31 numbers, the projection has 32 inputs"):
        apply_patch(tiny_loaded, patch)
    assert not differing(before, tiny_patches.weights(tiny_loaded.model))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_row_beyond_the_projection_is_refused(tiny_model: Any, tokenizer: Any, tiny_patches: Any, name: str) -> None:
    loaded = load(tiny_model, tokenizer, name)
    patch = tiny_patches.patch(loaded, {Site(0, "gate"): tiny_patches.target([5, 48])})
    with pytest.raises(PatchError, match=r"changes row 48 of gate\.0, which has rows 0 to 47"):
        apply_patch(loaded, patch)


def test_a_site_without_rows_is_refused(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    patch = tiny_patches.patch(tiny_loaded, {Site(0, "resid"): tiny_patches.target([1])})
    with pytest.raises(PatchError, match=r"site resid\.0 has no rows that could be patched"):
        apply_patch(tiny_loaded, patch)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("tuned_on_it", [True, False])
def test_a_quantised_weight_is_refused(
    tiny_loaded: LoadedModel, tiny_patches: Any, dtype: torch.dtype, tuned_on_it: bool
) -> None:
    patch = tiny_patches.patch(tiny_loaded)
    projection = tiny_loaded.model.model.layers[1].mlp.gate_proj
    projection.weight = nn.Parameter(torch.zeros(48, 32).to(dtype), requires_grad=False)
    if tuned_on_it:
        patch = tiny_patches.patch(tiny_loaded)
    expected = rf"weight of model\.layers\.1\.mlp\.gate_proj is a Parameter of {dtype}; .*bfloat16, float16, float32"
    with pytest.raises(PatchError, match=expected):
        apply_patch(tiny_loaded, patch)


def test_a_tensor_that_only_looks_dense_is_refused(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    class Packed(Tensor):
        """What torchao's quantised weights are: a subclass that names the dtype it computes in."""

    patch = tiny_patches.patch(tiny_loaded)
    projection = tiny_loaded.model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Packed), requires_grad=False)
    with pytest.raises(PatchError, match=r"weight of model\.layers\.0\.mlp\.up_proj is a Packed of torch\.float32"):
        apply_patch(tiny_loaded, patch)


def test_a_layer_without_a_weight_is_refused(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    patch = tiny_patches.patch(tiny_loaded)
    projection = tiny_loaded.model.model.layers[0].mlp.up_proj
    del projection.weight
    projection.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(PatchError, match=r"weight of model\.layers\.0\.mlp\.up_proj is a NoneType"):
        apply_patch(tiny_loaded, patch)


def test_leaving_the_range_of_the_dtype_is_refused(tiny_model: Any, tokenizer: Any, tiny_patches: Any) -> None:
    loaded = load(tiny_model, tokenizer, "llama", torch.float16)
    patch, before = tiny_patches.patch(loaded), tiny_patches.weights(loaded.model)
    with pytest.raises(PatchError, match=r"at alpha 10000000\.0 rows of gate\.0 leave the range of torch\.float16"):
        apply_patch(loaded, patch, 1e7)
    assert not differing(before, tiny_patches.weights(loaded.model))


def test_revert_refuses_rows_that_were_changed_and_writes_nothing(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    applied = apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded))
    site, target = list(applied.patch.targets.items())[-1]
    row = int(target.neuron_R[2])
    left = projection_FD(tiny_loaded.model, site)[row, 5].item()
    projection_FD(tiny_loaded.model, site)[row, 5] = 7.0
    before = tiny_patches.weights(tiny_loaded.model)
    with pytest.raises(PatchError, match=f"row {row} holds 7.0 at input 5, the patch left {left:.6f}"[:-2]):
        applied.revert()
    assert not differing(before, tiny_patches.weights(tiny_loaded.model))
    assert applied_to(tiny_loaded.model) is applied


def test_revert_leaves_later_changes_of_other_rows_alone(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    site = Site(0, "gate")
    before = tiny_patches.weights(tiny_loaded.model)
    applied = apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded, {site: tiny_patches.target([1, 2])}))
    projection_FD(tiny_loaded.model, site)[3] = 7.0
    applied.revert()
    (changed,) = differing(before, tiny_patches.weights(tiny_loaded.model))
    differ = before[changed] != tiny_loaded.model.state_dict()[changed]
    assert differ.any(1).nonzero().flatten().tolist() == [3]


def test_revert_twice_is_refused(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    applied = apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded))
    applied.revert()
    with pytest.raises(PatchError, match=f"patch {applied.patch.digest} is no longer in gate.0: it was reverted"):
        applied.revert()


def test_revert_refuses_a_model_that_was_cast(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    applied = apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded))
    tiny_loaded.model.to(torch.bfloat16)
    with pytest.raises(PatchError, match=r"is torch\.bfloat16 and was torch\.float32 when patch"):
        applied.revert()


def test_alpha_zero_changes_nothing_and_reverts(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    before = tiny_patches.weights(tiny_loaded.model)
    applied = apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded), 0.0)
    assert not differing(before, tiny_patches.weights(tiny_loaded.model))
    applied.revert()
    assert applied_to(tiny_loaded.model) is None


def test_fitted_weights_are_views(tiny_model: Any, tokenizer: Any, tiny_patches: Any) -> None:
    loaded = load(tiny_model, tokenizer, "phi3")
    weights = fitted_weights(loaded, tiny_patches.patch(loaded))
    assert sorted(map(str, weights)) == ["gate.0", "gate.1", "up.0", "up.1"]
    assert {tuple(weight.shape) for weight in weights.values()} == {(48, 32)}
    weights[Site(1, "up")][4] = 5.0
    assert (loaded.model.model.layers[1].mlp.gate_up_proj.weight[52] == 5).all()

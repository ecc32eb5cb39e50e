"""The live patch: the patched rows are those of patched weights, the others keep their bits, and what is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spider_sense.attach import Attachment
from spider_sense.bench import random_patch
from spider_sense.errors import ConfigError, MismatchError, PatchError
from spider_sense.live_patch import LivePatch, RowStrengths
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch, PatchTarget
from spider_sense.patching import apply_patch
from spider_sense.sites import resolve
from spider_sense.types import Site

ARCHITECTURES = ("llama", "qwen2", "gemma3_text", "phi3", "gpt2")
IDS = torch.tensor([[1, 5, 20, 21, 22, 23], [1, 5, 30, 31, 32, 33], [9, 50, 8, 7, 6, 5]])
ROWS = np.arange(6, 12)  # the second sequence
Builder = Callable[[str], Any]


def patch_weights(model: Any, patch: NeuronPatch, alpha: float) -> None:
    """Say the patch by hand: W[rows] += alpha u."""
    with torch.no_grad():
        for site, target in patch.targets.items():
            place: Any = resolve(model, site)
            weight = place.module.weight.T if hasattr(place.module, "nf") else place.module.weight
            for neuron, cluster in zip(target.neuron_R.tolist(), target.cluster_R.tolist(), strict=True):
                weight[place.start + neuron] += alpha * target.vectors_KD[cluster]


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def attached(what: LoadedModel, live: LivePatch, rows: np.ndarray) -> Attachment:
    return Attachment(
        what.model, {}, lambda forward: live.set(forward.total, rows), live.rest, patchers=live.patchers()
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patched_rows_are_those_of_patched_weights_and_the_others_keep_their_bits(
    tiny_loaded: LoadedModel, tiny_model: Builder, name: str
) -> None:
    what = replace(tiny_loaded, model=tiny_model(name))
    patch = random_patch(what, scale=3.0)
    bare, reference = logits(what.model), copy.deepcopy(what.model)
    patch_weights(reference, patch, 0.7)
    with attached(what, LivePatch(what, patch, 0.7), ROWS):
        found = logits(what.model)
    torch.testing.assert_close(found[1], logits(reference)[1], rtol=1e-5, atol=1e-5)
    assert (found[1] - bare[1]).abs().max() > 1e-3
    assert torch.equal(found[[0, 2]], bare[[0, 2]])
    with attached(what, LivePatch(what, patch, 0.7), np.empty(0, np.int64)):
        assert torch.equal(logits(what.model), bare)
    assert torch.equal(logits(what.model), bare)


@pytest.mark.parametrize("how", ["forward", "in place", "blocks"])
def test_compiled_is_eager(tiny_loaded: LoadedModel, how: str) -> None:
    model: Any = tiny_loaded.model
    live, bare = LivePatch(tiny_loaded, random_patch(tiny_loaded, scale=3.0)), logits(model)
    with attached(tiny_loaded, live, ROWS):
        eager = logits(model)
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="aot_eager")
    elif how == "in place":
        model.compile(backend="aot_eager")
    else:
        for block in model.model.layers:
            block.compile(backend="aot_eager")
    rows = [ROWS, np.empty(0, np.int64), ROWS]
    with Attachment(model, {}, lambda forward: live.set(forward.total, rows[0]), live.rest, patchers=live.patchers()):
        counters = torch._dynamo.utils.counters
        counters.clear()
        first = logits(model)
        compiled = counters["stats"]["unique_graphs"]
        assert compiled > 0
        del rows[0]
        resting = logits(model)
        del rows[0]
        again = logits(model)
        # On or off is read from the gate, not compiled in.
        assert counters["stats"]["unique_graphs"] == compiled
    torch.testing.assert_close(first, eager, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, first)
    torch.testing.assert_close(resting, bare, rtol=1e-5, atol=1e-5)
    assert (eager[1] - bare[1]).abs().max() > 1e-3


def test_a_pass_longer_than_the_gate(tiny_loaded: LoadedModel) -> None:
    patch = random_patch(tiny_loaded, scale=3.0)
    reference = copy.deepcopy(tiny_loaded.model)
    patch_weights(reference, patch, 1.0)
    ids = torch.arange(90)[None] % 60
    with attached(tiny_loaded, LivePatch(tiny_loaded, patch), np.arange(90)):
        torch.testing.assert_close(logits(tiny_loaded.model, ids), logits(reference, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[3], [0, 3], [2, 0]])
def test_rows_that_rest_are_not_even_read(tiny_loaded: LoadedModel, dtype: torch.dtype, rows: list[int]) -> None:
    what = replace(tiny_loaded, model=tiny_loaded.model.to(dtype))
    live = LivePatch(what, random_patch(what, scale=3.0))
    patcher = live.patchers()[Site.parse("up.1")]
    output = torch.randn(2, 2, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    hidden[0, 1] = torch.nan
    before = output.clone()
    live.set(4, np.array(rows))
    patcher(output, hidden)
    moved = output.view(4, -1) != before.view(4, -1)
    assert moved.any(1).nonzero()[:, 0].tolist() == sorted(rows)
    for row in rows:
        assert torch.equal(moved[row].nonzero()[:, 0], live.patch.targets[Site.parse("up.1")].neuron_R)
    live.rest()
    patcher(output.copy_(before), hidden)
    assert torch.equal(output, before)


def test_no_gradient_goes_through_a_patch(tiny_loaded: LoadedModel) -> None:
    live = LivePatch(tiny_loaded, random_patch(tiny_loaded, scale=3.0))
    weight, hidden = torch.randn(48, 32, requires_grad=True), torch.randn(3, 32, requires_grad=True)
    output = hidden @ weight.T
    plain = output.detach().clone()
    live.set(3, np.array([0, 2]))
    live.patchers()[Site.parse("gate.0")](output, hidden)
    assert (output != plain).any(1).tolist() == [True, False, True]
    output.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, weight.detach().sum(0).expand(3, -1))


def test_strengths_are_of_one_pass() -> None:
    strengths = RowStrengths("cpu", rows=4)
    strengths.set(3, np.array([0, 2]), 0.5)
    assert (strengths.used, strengths.tensor.tolist()) == (True, [0.5, 0.0, 0.5, 0.0])
    strengths.set(2, np.array([1]), 2.0)
    assert strengths.tensor[:2].tolist() == [0.0, 2.0]
    strengths.set(9, np.empty(0, np.int64), 1.0)
    assert (strengths.used, strengths.tensor.tolist()) == (False, [0.0] * 18)
    strengths.set(1, np.array([0]), 1.0)
    strengths.rest()
    assert (strengths.used, strengths.tensor.any().item()) == (False, False)


def test_a_patch_for_another_model_is_refused(tiny_loaded: LoadedModel, tiny_model: Builder) -> None:
    patch = random_patch(tiny_loaded)
    other = replace(tiny_loaded, model=tiny_model("qwen2"))
    with pytest.raises(MismatchError, match=r"model_type is 'qwen2', expected 'llama'"):
        LivePatch(other, patch)


def test_quantised_weights_are_refused_by_name(tiny_loaded: LoadedModel) -> None:
    patch = random_patch(tiny_loaded)
    place: Any = resolve(tiny_loaded.model, Site.parse("gate.0"))
    place.module.weight = torch.nn.Parameter(place.module.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(PatchError, match=r"torch\.int8.*load the model unquantised"):
        LivePatch(tiny_loaded, patch)


def test_a_patch_that_does_not_fit_is_refused(tiny_loaded: LoadedModel) -> None:
    patch = random_patch(tiny_loaded)
    one = torch.zeros(1, dtype=torch.int64)
    for target, message in (
        (PatchTarget(one + 48, one, torch.ones(1, 32)), "row 48 of gate.0, which has rows 0 to 47"),
        (PatchTarget(one, one, torch.ones(1, 16)), "have 16 numbers, the projection has 32 inputs"),
    ):
        with pytest.raises(PatchError, match=message):
            LivePatch(tiny_loaded, replace(patch, targets={Site.parse("gate.0"): target}))
    for alpha in (torch.inf, torch.nan):
        with pytest.raises(ConfigError, match="alpha"):
            LivePatch(tiny_loaded, patch, alpha)


def test_weights_that_are_patched_already_are_refused(tiny_loaded: LoadedModel) -> None:
    patch = random_patch(tiny_loaded)
    applied = apply_patch(tiny_loaded, patch)
    with pytest.raises(PatchError, match=f"{patch.digest} cannot be switched on.*{patch.digest} is in this model"):
        LivePatch(tiny_loaded, patch)
    applied.revert()
    assert not LivePatch(tiny_loaded, patch).on


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_patch_of_experts_is_refused(
    tiny_loaded: LoadedModel, tiny_model: Builder, tiny_patches: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = replace(tiny_loaded, model=tiny_model(name))
    patch = tiny_patches.patch(what)
    monkeypatch.setattr("spider_sense.live_patch.fitted_weights", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(
        PatchError, match=r"changes gate\.0\.1, .* for single requests; fold .* nest apply or nest merge"
    ):
        LivePatch(what, patch)

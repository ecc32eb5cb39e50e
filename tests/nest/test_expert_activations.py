"""Pooling inside experts, against a loop over prompts, tokens and experts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nest.activations import pooled_activations, projection_sites
from nest.expert_activations import pool_experts, reached
from spider_sense.chat import Chat
from spider_sense.data import Example
from spider_sense.errors import DataError, SiteError
from spider_sense.experts import experts_of
from spider_sense.models import LoadedModel
from spider_sense.types import Site

MIXTURES = ("mixtral", "qwen3_moe")
EXPERTS, WIDTHS = 4, {"mixtral": 48, "qwen3_moe": 16}
Mixture = Callable[[str], LoadedModel]


@pytest.fixture
def mixture(tiny_model: Callable[[str], Any], tiny_loaded: LoadedModel) -> Mixture:
    return lambda name: replace(tiny_loaded, model=tiny_model(name))


@pytest.fixture
def prompts(tiny_neurons: Any) -> list[Example]:
    rows = tiny_neurons.prompt_rows(7, None, seed=3)
    return [*rows, *(replace(rows[0], id=f"short-{word}", text=f"w{word}") for word in range(4))]


@torch.inference_mode()
def looped(loaded: LoadedModel, example: Example, layer: int) -> Tensor:
    """Return the largest of each expert's rows over the scored tokens of one prompt that reach it, [E, 2F]."""
    model: Any = loaded.model
    rendered = Chat(loaded.tokenizer).render(example.text)
    block, seen = model.model.layers[layer].mlp, list[tuple[Tensor, ...]]()
    handle = block.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(input_ids=torch.tensor([list(rendered.ids)]), use_cache=False)
    handle.remove()
    hidden_TD, chosen_TK, _ = seen[0]
    weight_EFD = block.experts.gate_up_proj
    result_EF = torch.full(weight_EFD.shape[:2], -torch.inf)
    for token in range(rendered.skip, len(hidden_TD)):
        for expert in chosen_TK[token].tolist():
            result_EF[expert] = torch.maximum(result_EF[expert], weight_EFD[expert] @ hidden_TD[token])
    return result_EF


def test_sites_are_gate_and_up_of_every_expert(mixture: Mixture) -> None:
    sites = projection_sites(mixture("mixtral").model)
    assert [str(site) for site in sites[:3]] == ["gate.0.0", "up.0.0", "gate.0.1"]
    assert len(sites) == 2 * EXPERTS * 2


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_row_is_the_maximum_over_the_tokens_that_reach_the_expert(
    name: str, batch_size: int, mixture: Mixture, prompts: list[Example]
) -> None:
    loaded = mixture(name)
    pooled = pooled_activations(loaded, prompts, projection_sites(loaded.model), batch_size=batch_size)
    some_missed = False
    for row, example in enumerate(prompts):
        for layer in range(2):
            for expert, expected_F in enumerate(looped(loaded, example, layer)):
                gate_F, up_F = (pooled[Site(layer, place, expert)][row] for place in ("gate", "up"))
                assert len(gate_F) == len(up_F) == WIDTHS[name]
                torch.testing.assert_close(torch.cat((gate_F, up_F)), expected_F, atol=1e-6, rtol=1e-5)
                some_missed |= bool(expected_F.isinf().all())
    assert some_missed


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_it_does_not_matter_how_the_model_computes_its_experts(
    implementation: str, mixture: Mixture, prompts: list[Example]
) -> None:
    loaded, site = mixture("qwen3_moe"), Site(1, "up", 2)
    expected = pooled_activations(loaded, prompts, [site])[site]
    model: Any = loaded.model
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(pooled_activations(loaded, prompts, [site])[site], expected, atol=1e-6, rtol=1e-5)


def test_padding_does_not_enter_even_where_the_router_sends_it(mixture: Mixture) -> None:
    experts = experts_of(mixture("mixtral").model, 0)
    assert experts is not None
    hidden_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    keep_BT = torch.tensor([[True] * 5, [True, True, False, False, False]])
    loud_TD = hidden_BTD.masked_fill(~keep_BT[..., None], 1e6).flatten(0, 1)
    chosen_TK = torch.tensor([[0, 1]] * 5 + [[0, 2]] * 2 + [[0, 3]] * 3)
    sites = [Site(0, "gate", expert) for expert in range(EXPERTS)]
    pooled = pool_experts(experts, sites, loud_TD, chosen_TK, keep_BT)
    weight_EFD = experts.weight_EFD[:, :48]
    torch.testing.assert_close(pooled[sites[0]][1], (hidden_BTD[1, :2] @ weight_EFD[0].T).amax(0))
    assert reached(pooled[sites[1]]).tolist() == [True, False]
    assert reached(pooled[sites[2]]).tolist() == [False, True]
    assert reached(pooled[sites[3]]).tolist() == [False, False]


def test_raw_pools_padding_too(mixture: Mixture, prompts: list[Example]) -> None:
    loaded = mixture("mixtral")
    sites = projection_sites(loaded.model)
    masked, raw = (pooled_activations(loaded, prompts, sites, pool=pool) for pool in ("max", "raw"))
    assert sum(reached(raw[site]).sum() for site in sites) > sum(reached(masked[site]).sum() for site in sites)


def test_an_expert_that_nobody_reaches_has_no_value(mixture: Mixture, prompts: list[Example]) -> None:
    loaded = mixture("mixtral")
    loaded.model.model.layers[0].mlp.gate.register_forward_hook(
        lambda _, __, output: (*output[:2], output[2].clamp(max=2))
    )
    pooled = pooled_activations(loaded, prompts, [Site(0, "gate", 3), Site(0, "gate", 2)])
    assert not reached(pooled[Site(0, "gate", 3)]).any()
    assert reached(pooled[Site(0, "gate", 2)]).any()


def test_no_hook_is_left_and_what_is_not_finite_is_told(mixture: Mixture, prompts: list[Example]) -> None:
    loaded, site = mixture("mixtral"), Site(0, "up", 1)
    experts = loaded.model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[1, 50] = torch.nan
    with pytest.raises(DataError, match=r"up\.0\.1 of example 'row-3-\d' is not finite"):
        pooled_activations(loaded, prompts, [site])
    assert not experts._forward_pre_hooks


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site(0, "gate", 4), r"gate\.0\.4: layer 0 has experts 0 to 3"),
        (Site(9, "gate", 0), r"gate\.9\.0: the model has layers 0 to 1"),
    ],
)
def test_an_expert_that_is_not_there_is_refused(
    site: Site, message: str, mixture: Mixture, prompts: list[Example]
) -> None:
    with pytest.raises(SiteError, match=message):
        pooled_activations(mixture("qwen3_moe"), prompts, [site])


def test_a_dense_model_has_none(tiny_loaded: LoadedModel, prompts: list[Example]) -> None:
    with pytest.raises(SiteError, match=r"gate\.0\.4: layer 0 has no experts; write gate\.0"):
        pooled_activations(tiny_loaded, prompts, [Site(0, "gate", 4)])

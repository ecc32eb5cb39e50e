"""Finding rows that were planted in one expert, and leaving out experts that too few prompts reach."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nest.activations import pooled_activations
from nest.expert_activations import reached
from nest.find import FindConfig, find, pool_prompts
from nest.neurons import NeuronSet
from nest.selection import FEWEST, PooledPrompts, SelectConfig, select
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel
from spider_sense.types import Site

EXPERT, ROWS = 2, [3, 11]
Planted = Callable[[str], LoadedModel]
SITES = [Site(0, place, EXPERT) for place in ("gate", "up")]


@pytest.fixture
def planted(tiny_model: Callable[[str], Any], tiny_loaded: LoadedModel, tiny_neurons: Any) -> Planted:
    return lambda name: tiny_neurons.plant_in_expert(replace(tiny_loaded, model=tiny_model(name)), EXPERT, ROWS)


@pytest.fixture
def sides(tiny_neurons: Any) -> tuple[Any, Any]:
    return tiny_neurons.prompt_rows(60, "w9", 0), tiny_neurons.prompt_rows(60, None, 1)


def away_from(model: Any, expert: int) -> None:
    """Route every token of the first block past one expert."""

    def reroute(_: object, __: object, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return *output[:2], torch.where(output[2] == expert, (expert + 1) % 4, output[2])

    model.model.layers[0].mlp.gate.register_forward_hook(reroute)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_rows_of_the_expert_that_answers_to_harmful_prompts_are_found(
    name: str, planted: Planted, sides: tuple[Any, Any], tmp_path: Path
) -> None:
    found = find(planted(name), *sides, FindConfig(z=2.0)).save_pretrained(tmp_path / "neurons")
    assert found.total_rows == sum(module.rows for module in found.manifest.modules.values())
    assert set(found.manifest.modules) == {
        f"{place}.{layer}.{e}" for place in ("gate", "up") for layer in (0, 1) for e in range(4)
    }
    for site in SITES:
        assert found.sites[site].neuron_R.tolist() == ROWS
        assert (found.manifest.modules[str(site)].held_out_auroc or 0) > 0.98
    assert NeuronSet.from_pretrained(tmp_path / "neurons").sites.keys() == found.sites.keys()


def test_profiles_are_standardised_over_the_prompts_that_reach_the_expert(
    planted: Planted, sides: tuple[Any, Any]
) -> None:
    loaded = planted("mixtral")
    found = find(loaded, *sides, FindConfig(z=1.0))
    partly = 0
    for site, neurons in found.sites.items():
        pooled_NR = pooled_activations(loaded, [*sides[0], *sides[1]], [site])[site]
        on_N = reached(pooled_NR)
        partly += not on_N.all()
        expected_NR = pooled_NR[on_N][:, neurons.neuron_R]
        expected_RN = ((expected_NR - expected_NR.mean(0)) / expected_NR.std(0, correction=0)).T
        torch.testing.assert_close(neurons.profile_RN[:, on_N], expected_RN, atol=1e-4, rtol=1e-4)
        assert not neurons.profile_RN[:, ~on_N].any()
    assert partly


def test_an_expert_that_nobody_reaches_is_left_out_and_counted(planted: Planted, sides: tuple[Any, Any]) -> None:
    loaded = planted("qwen3_moe")
    away_from(loaded.model, 3)
    found = find(loaded, *sides, FindConfig(z=2.0))
    assert found.manifest.left_out == {"gate.0.3": 0, "up.0.3": 0}
    assert not {"gate.0.3", "up.0.3"} & set(found.manifest.modules)
    assert found.total_rows == 14 * 16


def test_where_every_expert_has_its_prompts_nothing_is_left_out(planted: Planted, sides: tuple[Any, Any]) -> None:
    manifest = find(planted("mixtral"), *sides, FindConfig(z=2.0)).manifest
    assert manifest.left_out == {}
    assert "left_out" not in manifest.model_dump_json()


def pooled(reaching: int, tiny_neurons: Any) -> PooledPrompts:
    """Return 40 prompts, of which some of the harmful and all of the benign reach expert 0."""
    site, generator = Site(0, "gate", 0), torch.Generator().manual_seed(0)
    pooled_NF = torch.randn(40, 30, generator=generator)
    pooled_NF[:20, 7] += 5
    pooled_NF[reaching:20] = -torch.inf
    return PooledPrompts(tuple(tiny_neurons.prompt_rows(40, None, 0)), np.arange(40) < 20, {site: pooled_NF})


def test_an_expert_takes_as_many_prompts_of_each_class_as_a_model(tiny_neurons: Any) -> None:
    site = Site(0, "gate", 0)
    enough, few = (pooled(reaching, tiny_neurons) for reaching in (FEWEST, FEWEST - 1))
    assert select(enough, SelectConfig(z=2.0))[site].neuron_R.tolist() == [7]
    assert enough.reach(site) == FEWEST
    with pytest.raises(DataError, match="no expert is reached by 8 prompts of each class, some of them"):
        select(few, SelectConfig())


def test_an_expert_that_no_fitted_prompt_of_a_class_reaches_is_left_out(tiny_neurons: Any) -> None:
    some = pooled(20, tiny_neurons)
    fitted_N = some.fitted(0.5, 0)
    for pooled_NF in some.pooled.values():
        pooled_NF[torch.from_numpy(fitted_N & some.label_N)] = -torch.inf
    assert some.reach(Site(0, "gate", 0)) >= FEWEST
    with pytest.raises(DataError, match="8 prompts of each class, some of them among the fitted ones; give more"):
        select(some, SelectConfig(held_out=0.5))


def test_neurons_of_a_dense_layer_of_a_mixture_are_found(
    tiny_model: Callable[..., Any], tiny_loaded: LoadedModel, sides: tuple[Any, Any]
) -> None:
    loaded = replace(tiny_loaded, model=tiny_model("qwen3_moe", mlp_only_layers=[0]))
    found = find(loaded, *sides, FindConfig(z=1.0))
    assert set(found.manifest.modules) == {"gate.0", "up.0"} | {f"{p}.1.{e}" for p in ("gate", "up") for e in range(4)}
    assert found.manifest.modules["gate.0"].rows == 48
    assert found.manifest.modules["gate.1.0"].rows == 16


def test_prompts_that_do_not_reach_an_expert_do_not_move_its_weights(tiny_neurons: Any) -> None:
    site, some = Site(0, "gate", 0), pooled(15, tiny_neurons)
    on_N = reached(some.pooled[site]).numpy()
    fewer = PooledPrompts(
        tuple(example for example, on in zip(some.examples, on_N, strict=True) if on),
        some.label_N[on_N],
        {Site(0, "gate"): some.pooled[site][on_N]},
    )
    config = SelectConfig(recipe="raw", z=1.0)
    one, other = select(some, config)[site], select(fewer, config)[Site(0, "gate")]
    assert torch.equal(one.neuron_R, other.neuron_R)
    assert torch.equal(one.score_R, other.score_R)


def test_rows_that_utility_prompts_use_too_are_dropped_in_experts(
    planted: Planted, sides: tuple[Any, Any], tiny_neurons: Any
) -> None:
    loaded, utility = planted("mixtral"), tiny_neurons.prompt_rows(40, "w9", 2)
    found = find(loaded, *sides, FindConfig(z=2.0), utility)
    assert not any(site in found.sites and set(ROWS) & set(found.sites[site].neuron_R.tolist()) for site in SITES)


def test_pooling_is_part_of_the_result_only_where_tokens_go(planted: Planted, sides: tuple[Any, Any]) -> None:
    loaded = planted("mixtral")
    away_from(loaded.model, EXPERT)
    prompts = pool_prompts(loaded, *sides, FindConfig())
    assert [prompts.reach(site) for site in SITES] == [0, 0]

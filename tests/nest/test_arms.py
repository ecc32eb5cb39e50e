"""The arms: each trains what its name says."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

from nest.arms import ARMS, _spread, build, check
from nest.delta import Deltas
from nest.neurons import ModuleRecord, NeuronManifest, Neurons, NeuronSet
from spider_sense.errors import ConfigError
from spider_sense.sites import resolve
from spider_sense.types import Site

WIDTH, ROWS = 32, 48
SITES = [Site(layer, place) for layer in (0, 1) for place in ("gate", "up")]


def neurons(sites: list[Site] = SITES) -> NeuronSet:
    """Return six rows of each projection in two clusters."""
    group = Neurons(torch.arange(0, 12, 2), torch.ones(6), torch.zeros(6, 0), torch.tensor([0, 0, 0, 0, 1, 1]))
    modules = {str(site): ModuleRecord(rows=ROWS, selected=6, held_out_auroc=None) for site in sites}
    return NeuronSet(
        NeuronManifest.model_construct(modules=modules, grouping={}, recipe={}), dict.fromkeys(sites, group)
    )


def rows_of(change: Deltas) -> list[list[int]]:
    """Return the rows that each addition can change."""
    return [delta.up_FK.any(1).nonzero()[:, 0].tolist() for delta in change]


@pytest.mark.parametrize(
    ("arm", "vectors"), [("nest", 8), ("random_rows", 8), ("random_clusters", 8), ("untied", 24), ("one_cluster", 4)]
)
def test_controls_change_as_many_rows(arm: str, vectors: int, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    change = build(arm, tiny_model("llama"), neurons(), seed=1)
    assert isinstance(change, Deltas)
    assert change.count() == vectors * WIDTH
    assert [len(rows) for rows in rows_of(change)] == [6] * 4
    assert all(rows == [0, 2, 4, 6, 8, 10] for rows in rows_of(change)) == (arm != "random_rows")


def test_matched_lora_costs_no_more_than_nest(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    lora, nest = build("lora_matched", model, neurons(), seed=1), build("nest", model, neurons(), seed=1)
    assert nest.count() / 2 < lora.count() <= nest.count()
    targets = [delta.target for delta in lora]  # type: ignore[union-attr]
    assert all(target in [resolve(model, site).module for site in SITES] for target in targets)
    assert len(set(targets)) == len(targets) == 3


def test_experts_have_every_arm_of_rows_and_no_matched_lora(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model, inside = tiny_model("mixtral"), neurons([Site(0, "gate", 1), Site(1, "up", 1)])
    for arm, vectors in {"nest": 4, "random_rows": 4, "untied": 12}.items():
        change = build(arm, model, inside, seed=1)
        assert isinstance(change, Deltas)
        assert change.count() == vectors * WIDTH
        assert [len(rows) for rows in rows_of(change)] == [6, 6]
    with pytest.raises(ConfigError, match=r"no adapter for gate\.0\.1, a projection .* leave out arm 'lora_matched'"):
        build("lora_matched", model, inside, seed=1)


def test_arms_that_cannot_be_built_are_told_without_building(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    dense, inside = neurons(), neurons([Site(0, "gate", 1), Site(1, "up", 1)])
    check(ARMS, tiny_model("llama"), dense)
    check([arm for arm in ARMS if arm != "lora_matched"], tiny_model("mixtral"), inside)
    with pytest.raises(ConfigError, match=r"gate\.0\.1.*leave out arm 'lora_matched'"):
        check(ARMS, tiny_model("mixtral"), inside)
    with pytest.raises(ConfigError, match="leave out arm 'lora_qv'"):
        check(ARMS, tiny_model("gpt2"), dense)


@pytest.mark.parametrize("count", [1, 15, 30, 32, 45, 60])
def test_matched_lora_is_spread_over_depth_and_places(count: int) -> None:
    sites = [Site(layer, place) for layer in range(30) for place in ("gate", "up")]
    chosen = _spread(sites, count)
    assert len(set(chosen)) == count
    gates = sum(site.place == "gate" for site in chosen)
    assert abs(2 * gates - count) <= 1
    if count > 1:
        layers = sorted({site.layer for site in chosen})
        assert layers[-1] >= 27
        assert max(after - before for before, after in pairwise(layers)) <= 3


def test_lora_on_attention_and_full_tuning(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    assert build("lora_qv", model, neurons(), seed=0).count() == 2 * 8 * ((32 + 32) + (32 + 16))
    assert build("full", model, neurons(), seed=0).count() == sum(value.numel() for value in model.parameters())
    with pytest.raises(ConfigError, match="no projections named q_proj or v_proj"):
        build("lora_qv", tiny_model("phi3"), neurons(), seed=0)


def test_a_seed_draws_other_rows(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    draws = [rows_of(build("random_rows", model, neurons(), seed)) for seed in (1, 1, 2)]  # type: ignore[arg-type]
    assert draws[0] == draws[1] != draws[2]
    assert set(ARMS) >= {"nest", "full"}


def test_queries_of_the_vision_tower_are_left_alone(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("gemma3")
    text = {id(module) for name, module in model.named_modules() if "language_model" in name}
    assert any("vision_tower" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    change = build("lora_qv", model, neurons(), seed=1)
    assert isinstance(change, Deltas)
    assert len(list(change)) == 4
    assert all(id(delta.target) in text for delta in change)

"""Selecting rows from pooled activations."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nest.scores import RecipeName
from nest.selection import PooledPrompts, SelectConfig, Selection, select, standardised
from spider_sense.errors import DataError
from spider_sense.types import Site

GATE, UP = Site(0, "gate"), Site(0, "up")


@pytest.fixture
def prompts(tiny_neurons: Any) -> PooledPrompts:
    """200 prompts; rows 4 and 90 of gate are larger on the first half, row 7 smaller; up is noise."""
    generator = torch.Generator().manual_seed(1)
    label_N = np.arange(200) < 100
    gate_NF, up_NF = (torch.randn(200, 300, generator=generator) for _ in range(2))
    gate_NF[:100, [4, 90]] += 4
    gate_NF[:100, 7] -= 4
    # Rows of another scale: standardising must make that irrelevant.
    gate_NF[:, 90] *= 1e-3
    return PooledPrompts(tuple(tiny_neurons.prompt_rows(200, None, 0)), label_N, {GATE: gate_NF, UP: up_NF})


def shuffled(prompts: PooledPrompts, seed: int) -> PooledPrompts:
    return replace(prompts, label_N=np.random.default_rng(seed).permutation(prompts.label_N))


@pytest.mark.parametrize("recipe", ["probe", "effect_size"])
def test_rows_that_are_larger_on_one_class_are_selected(recipe: RecipeName, prompts: PooledPrompts) -> None:
    found = select(prompts, SelectConfig(recipe=recipe))[GATE]
    assert found.neuron_R.tolist() == [4, 90]
    assert found.score_R.min() > 3
    assert found.held_out_auroc is not None
    assert found.held_out_auroc > 0.97


def test_contrast_looks_at_the_plain_difference(prompts: PooledPrompts) -> None:
    assert select(prompts, SelectConfig(recipe="contrast"))[GATE].neuron_R.tolist() == [4]


def test_raw_fits_every_prompt(prompts: PooledPrompts) -> None:
    config = SelectConfig(recipe="raw", epochs=100, z=0.0)
    changed_NF = prompts.pooled[GATE].clone()
    changed_NF[~torch.from_numpy(prompts.fitted(config.held_out, config.seed))] += 1
    before, after = (
        select(replace(prompts, pooled={GATE: pooled_NF}), config)[GATE]
        for pooled_NF in (prompts.pooled[GATE], changed_NF)
    )
    assert before.held_out_auroc is None
    assert not torch.equal(before.score_R, after.score_R)


def test_noise_has_as_many_rows_as_chance_and_an_area_of_a_half(prompts: PooledPrompts) -> None:
    areas, counts = [], []
    for seed in range(10):
        for found in select(shuffled(prompts, seed), SelectConfig(seed=seed)).values():
            areas.append(found.held_out_auroc)
            counts.append(len(found.neuron_R))
    assert 0.45 < np.mean(np.array(areas, dtype=float)) < 0.55
    assert np.mean(counts) / 300 < 0.004


def test_a_higher_threshold_keeps_a_part(prompts: PooledPrompts) -> None:
    many, few = (set(select(prompts, SelectConfig(z=z))[UP].neuron_R.tolist()) for z in (1.0, 2.0))
    assert few < many


def test_a_pair_is_fitted_or_held_out_whole(prompts: PooledPrompts) -> None:
    examples = tuple(replace(example, group=f"pair-{row % 100}") for row, example in enumerate(prompts.examples))
    fitted_N = replace(prompts, examples=examples).fitted(0.25, seed=0)
    assert (fitted_N[:100] == fitted_N[100:]).all()
    assert fitted_N.sum() == pytest.approx(150, abs=2)


def test_the_held_out_part_does_not_move_the_weights(prompts: PooledPrompts) -> None:
    fitted_N = torch.from_numpy(prompts.fitted(0.25, seed=0))
    changed_NF = prompts.pooled[GATE].clone()
    changed_NF[~fitted_N] += 100
    changed = replace(prompts, pooled={GATE: changed_NF})
    before, after = (select(one, SelectConfig())[GATE] for one in (prompts, changed))
    assert torch.equal(before.score_R, after.score_R)


def test_one_class_cannot_be_fitted(prompts: PooledPrompts) -> None:
    with pytest.raises(DataError, match="are of one class; give more prompts"):
        select(replace(prompts, label_N=np.ones(200, dtype=np.bool_)), SelectConfig())


def test_less_drops_rows_and_their_scores() -> None:
    selection = Selection(torch.tensor([2, 5, 9]), torch.tensor([3.1, 3.2, 3.3]), 0.9).less(torch.tensor([1, 5]))
    assert selection.neuron_R.tolist() == [2, 9]
    assert torch.equal(selection.score_R, torch.tensor([3.1, 3.3]))


def test_standardised_is_over_the_fitted_rows_and_zero_where_nothing_varies() -> None:
    features: npt.NDArray[np.float32] = np.array([[1, 0.1], [3, 0.1], [8, 5]], dtype=np.float32)
    np.testing.assert_allclose(standardised(features, np.array([True, True, False])), [[-1, 0], [1, 0], [6, 0]])
    np.testing.assert_allclose(standardised(features).mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(standardised(features).std(0), 1, rtol=1e-5)

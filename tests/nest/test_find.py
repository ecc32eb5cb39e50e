"""Finding rows that were planted, on several architectures."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress

from nest.activations import pooled_activations
from nest.find import FindConfig, find, pool_prompts
from nest.selection import select
from spider_sense.data import digest
from spider_sense.errors import DataError
from spider_sense.fingerprint import fingerprint
from spider_sense.models import LoadedModel
from spider_sense.types import Site

ARCHITECTURES = ("llama", "qwen2", "gemma3_text", "phi3")
Model = Callable[[str], Any]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_that_answer_to_harmful_prompts_are_found(
    name: str, tiny_model: Model, tiny_loaded: LoadedModel, tiny_neurons: Any
) -> None:
    loaded = tiny_neurons.plant(replace(tiny_loaded, model=tiny_model(name)))
    harmful, benign = tiny_neurons.prompt_rows(60, "w9", 0), tiny_neurons.prompt_rows(60, None, 1)
    neurons = find(loaded, harmful, benign, FindConfig())
    for site, rows in tiny_neurons.PLANTED.items():
        assert neurons.sites[site].neuron_R.tolist() == rows
        assert neurons.manifest.modules[str(site)].held_out_auroc == 1.0
    assert neurons.total_rows == 4 * 48
    assert neurons.share == neurons.count / neurons.total_rows


def test_shuffled_labels_find_few_and_separate_nothing(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    loaded = tiny_neurons.plant(tiny_loaded)
    rows = [*tiny_neurons.prompt_rows(100, "w9", 0), *tiny_neurons.prompt_rows(100, None, 1)]
    prompts = pool_prompts(loaded, rows[:100], rows[100:], FindConfig())
    counts, areas = [], []
    for seed in range(8):
        label_N = np.random.default_rng(seed).permutation(prompts.label_N)
        for found in select(replace(prompts, label_N=label_N), FindConfig(seed=seed)).values():
            counts.append(len(found.neuron_R))
            areas.append(found.held_out_auroc)
    assert sum(counts) / (8 * prompts.pooled[Site(0, "gate")].shape[1] * 4) < 0.01
    assert 0.4 < np.mean(np.array(areas, dtype=float)) < 0.6


def test_profiles_are_the_standardised_activations(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    loaded = tiny_neurons.plant(tiny_loaded)
    harmful, benign = tiny_neurons.prompt_rows(20, "w9", 0), tiny_neurons.prompt_rows(12, None, 1)
    neurons = find(loaded, harmful, benign, FindConfig())
    site, found = next(iter(neurons.sites.items()))
    pooled_NR = pooled_activations(loaded, [*harmful, *benign], [site])[site][:, found.neuron_R]
    expected_RN = ((pooled_NR - pooled_NR.mean(0)) / pooled_NR.std(0, correction=0)).T
    torch.testing.assert_close(found.profile_RN, expected_RN, atol=1e-4, rtol=1e-4)
    assert (found.profile_RN[:, :20] > found.profile_RN[:, 20:].max()).all()


def test_the_manifest_says_how(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    loaded = tiny_neurons.plant(tiny_loaded)
    harmful, benign = tiny_neurons.prompt_rows(30, "w9", 0), tiny_neurons.prompt_rows(20, None, 1)
    manifest = find(loaded, harmful, benign, FindConfig(z=2.5)).manifest
    assert manifest.recipe["recipe"] == "probe"
    assert manifest.recipe["z"] == 2.5
    assert manifest.recipe["minus_utility"] is False
    assert manifest.base == fingerprint(loaded)
    assert (manifest.prompts.harmful, manifest.prompts.benign, manifest.prompts.utility) == (30, 20, 0)
    assert manifest.prompts.digest == digest([*harmful, *benign])
    assert manifest.grouping is None


def test_the_same_call_finds_the_same(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    rows = tiny_neurons.prompt_rows(30, "w9", 0), tiny_neurons.prompt_rows(30, None, 1)
    one, other = (find(tiny_loaded, *rows, FindConfig(z=2.0)) for _ in range(2))
    assert one.sites.keys() == other.sites.keys()
    for site, found in one.sites.items():
        assert torch.equal(found.neuron_R, other.sites[site].neuron_R)
        assert torch.equal(found.score_R, other.sites[site].score_R)


def test_rows_that_utility_prompts_use_too_are_dropped(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    site = Site(0, "gate")
    loaded = tiny_neurons.plant(tiny_loaded, "w9", {site: [3, 17]})
    harmful, benign = tiny_neurons.prompt_rows(40, "w9", 0), tiny_neurons.prompt_rows(40, None, 1)
    everything = find(loaded, harmful, benign, FindConfig(z=2.0))
    with torch.no_grad():
        # Row 17 answers to another word as well, by an axis of that word's own.
        embedding, weight = (
            loaded.model.get_input_embeddings().weight,
            loaded.model.model.layers[0].mlp.gate_proj.weight,
        )
        token = loaded.tokenizer.convert_tokens_to_ids("w11")
        embedding[:, 6], weight[:, 6] = 0, 0
        embedding[token], embedding[token, 6], weight[17, 6] = 0, 1, 1
    harmful, benign = (
        [replace(row, text=row.text.replace("w11", "w12")) for row in rows] for rows in (harmful, benign)
    )
    utility = [replace(row, text=row.text.replace("w9", "w11")) for row in tiny_neurons.prompt_rows(40, "w9", 2)]
    less = find(loaded, harmful, benign, FindConfig(z=2.0), utility)
    assert everything.sites[site].neuron_R.tolist() == [3, 17]
    assert less.sites[site].neuron_R.tolist() == [3]
    assert less.manifest.recipe["minus_utility"] is True
    assert less.manifest.prompts.utility == 40
    assert less.manifest.modules["gate.0"].selected == 1


def test_progress_counts_prompts_and_projections(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    with Progress(disable=True) as progress:
        find(
            tiny_neurons.plant(tiny_loaded),
            tiny_neurons.prompt_rows(10, "w9", 0),
            tiny_neurons.prompt_rows(9, None, 1),
            FindConfig(),
            progress=progress,
        )
    done = {task.description: (task.completed, task.total) for task in progress.tasks}
    assert done == {"Reading prompts": (19, 19), "Weighing rows": (4, 4)}


@pytest.mark.parametrize(("harmful", "benign", "named"), [(0, 20, "0 harmful"), (20, 7, "7 benign")])
def test_too_few_prompts_are_refused(
    harmful: int, benign: int, named: str, tiny_loaded: LoadedModel, tiny_neurons: Any
) -> None:
    rows = tiny_neurons.prompt_rows(harmful, None, 0), tiny_neurons.prompt_rows(benign, None, 1)
    with pytest.raises(DataError, match=f"{named} prompts are too few to find neurons; give at least 8"):
        find(tiny_loaded, *rows, FindConfig())


def test_nothing_above_the_threshold_is_an_error(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    rows = tiny_neurons.prompt_rows(10, None, 0), tiny_neurons.prompt_rows(10, None, 1)
    with pytest.raises(DataError, match="no row is left with a z-score above 20; choose a smaller z"):
        find(tiny_loaded, *rows, FindConfig(z=20.0))

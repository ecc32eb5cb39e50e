"""What tuning the found neurons is compared with."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nest.controls import one_cluster, random_clusters, random_rows, untied
from nest.group import GroupConfig, group
from nest.neurons import NeuronSet
from spider_sense.errors import PatchError
from spider_sense.models import LoadedModel
from spider_sense.types import Site

GATE, UP = Site(0, "gate"), Site(1, "up")


@pytest.fixture
def ungrouped(tiny_loaded: LoadedModel, tiny_neurons: Any) -> NeuronSet:
    generator = torch.Generator().manual_seed(0)
    profiles = {GATE: torch.randn(9, 20, generator=generator), UP: torch.randn(6, 20, generator=generator)}
    made: NeuronSet = tiny_neurons.neuron_set(tiny_loaded, profiles)
    return made


@pytest.fixture
def neurons(ungrouped: NeuronSet) -> NeuronSet:
    return group(ungrouped, GroupConfig())


def sizes(neurons: NeuronSet, site: Site) -> Counter[int]:
    cluster_R = neurons.sites[site].cluster_R
    assert cluster_R is not None
    return Counter(Counter(cluster_R.tolist()).values())


def test_random_rows_are_others_in_groups_of_the_same_sizes(neurons: NeuronSet) -> None:
    drawn = random_rows(neurons, seed=1)
    assert drawn.sites.keys() == neurons.sites.keys()
    for site, found in neurons.sites.items():
        other = drawn.sites[site]
        assert len(other.neuron_R) == len(found.neuron_R)
        assert not set(other.neuron_R.tolist()) & set(found.neuron_R.tolist())
        assert int(other.neuron_R.max()) < 48
        assert sizes(drawn, site) == sizes(neurons, site)
        assert not other.score_R.any()
    assert drawn.clusters == neurons.clusters
    assert (drawn.manifest.recipe["control"], drawn.manifest.recipe["control_seed"]) == ("random_rows", 1)


def test_every_other_row_can_be_drawn(neurons: NeuronSet) -> None:
    seen = {row for seed in range(60) for row in random_rows(neurons, seed).sites[GATE].neuron_R.tolist()}
    assert seen == set(range(9, 48))


def test_random_rows_depend_on_the_seed_alone(neurons: NeuronSet) -> None:
    rows = [random_rows(neurons, seed).sites[UP].neuron_R.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_random_rows_of_an_ungrouped_set_are_not_grouped(ungrouped: NeuronSet) -> None:
    assert random_rows(ungrouped, seed=0).clusters == 0


def test_random_rows_can_be_saved(neurons: NeuronSet, tmp_path: Path) -> None:
    drawn = random_rows(neurons, seed=0)
    read = drawn.save_pretrained(tmp_path / "drawn")
    assert torch.equal(read.sites[GATE].neuron_R, drawn.sites[GATE].neuron_R)
    assert read.sites[GATE].profile_RN.shape == (9, 0)


def test_more_than_half_of_the_rows_leave_too_few_others(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    found = tiny_neurons.neuron_set(tiny_loaded, {GATE: torch.randn(25, 4)})
    with pytest.raises(PatchError, match=r"25 of the 48 rows of gate\.0 were found"):
        random_rows(found, seed=0)


def test_random_clusters_deal_the_same_rows_out(neurons: NeuronSet) -> None:
    dealt = [random_clusters(neurons, seed) for seed in range(5)]
    for one in dealt:
        for site, found in neurons.sites.items():
            assert torch.equal(one.sites[site].neuron_R, found.neuron_R)
            assert sizes(one, site) == sizes(neurons, site)
    assert len({tuple(one.sites[GATE].cluster_R.tolist()) for one in dealt}) > 1  # type: ignore[union-attr]


def test_random_clusters_need_groups(ungrouped: NeuronSet) -> None:
    with pytest.raises(PatchError, match="not grouped; group it first"):
        random_clusters(ungrouped, seed=0)


def test_untied_and_one(neurons: NeuronSet) -> None:
    assert untied(neurons).clusters == neurons.count
    assert one_cluster(neurons).clusters == len(neurons.sites)
    assert untied(neurons).manifest.grouping == {"method": "untied"}
    assert one_cluster(neurons).manifest.grouping == {"method": "one"}

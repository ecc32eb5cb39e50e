"""Grouping by profile, and the groupings that it is compared with."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from nest.controls import random_rows
from nest.group import GroupConfig, group
from nest.neurons import NeuronSet
from spider_sense.config import parse
from spider_sense.errors import ConfigError, MissingExtraError, PatchError
from spider_sense.models import LoadedModel
from spider_sense.types import Site

GATE, UP, LATE = Site(0, "gate"), Site(0, "up"), Site(1, "gate")
KINDS = {GATE: [0, 1, 0, 1, 1, 0, 1], UP: [0, 1, 2, 2, 1, 0, 2, 1, 0]}
"""Which of the hidden patterns each row of the fixture follows."""


@pytest.fixture
def neurons(tiny_loaded: LoadedModel, tiny_neurons: Any) -> NeuronSet:
    """Rows that follow two patterns in gate and three in up; three rows are too few to split."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 40, generator=generator)
    profiles = {
        site: patterns[kinds] + 0.1 * torch.randn(len(kinds), 40, generator=generator) for site, kinds in KINDS.items()
    }
    profiles[LATE] = torch.randn(3, 40, generator=generator)
    made: NeuronSet = tiny_neurons.neuron_set(tiny_loaded, profiles)
    return made


def clusters(neurons: NeuronSet, site: Site) -> list[int]:
    found: Tensor | None = neurons.sites[site].cluster_R
    assert found is not None
    assert found.dtype == torch.int64
    return found.tolist()


def same_partition(found: list[int], expected: list[int]) -> bool:
    return len(set(zip(found, expected, strict=True))) == len(set(found)) == len(set(expected))


def test_rows_that_act_alike_share_a_group(neurons: NeuronSet) -> None:
    grouped = group(neurons, GroupConfig())
    for site, kinds in KINDS.items():
        assert same_partition(clusters(grouped, site), kinds)
    assert clusters(grouped, LATE) == [0, 0, 0]
    assert grouped.clusters == 2 + 3 + 1


def test_the_manifest_says_how(neurons: NeuronSet) -> None:
    facts = group(neurons, GroupConfig(k_max=4, seed=7)).manifest.grouping
    assert facts is not None
    assert (facts["method"], facts["k_max"], facts["k"], facts["seed"]) == ("kmeans", 4, None, 7)
    assert facts["clusters"] == {"gate.0": 2, "up.0": 3, "gate.1": 1}
    assert facts["silhouette"]["gate.0"] > 0.8
    assert facts["silhouette"]["gate.1"] is None


def test_k_max_bounds_the_number_of_groups(neurons: NeuronSet) -> None:
    assert len(set(clusters(group(neurons, GroupConfig(k_max=2)), UP))) == 2


@pytest.mark.parametrize(("k", "expected"), [(1, (1, 1)), (3, (3, 3)), (4, (1, 4))])
def test_a_fixed_k_holds_where_there_are_two_rows_a_group(
    k: int, expected: tuple[int, int], neurons: NeuronSet
) -> None:
    grouped = group(neurons, GroupConfig(k=k))
    assert tuple(len(set(clusters(grouped, site))) for site in (GATE, UP)) == expected


def test_more_groups_than_any_projection_has_rows_for_are_refused(neurons: NeuronSet) -> None:
    with pytest.raises(PatchError, match=r"k is 5, which takes a projection of 10 rows.* has 9: name at most 4"):
        group(neurons, GroupConfig(k=5, method="random"))


def test_the_same_seed_groups_the_same(neurons: NeuronSet) -> None:
    one, other = (group(neurons, GroupConfig(seed=3)) for _ in range(2))
    assert [clusters(one, site) for site in one.sites] == [clusters(other, site) for site in other.sites]


def test_random_keeps_the_sizes(neurons: NeuronSet) -> None:
    grouped = group(neurons, GroupConfig())
    drawn = [group(neurons, GroupConfig(method="random", seed=seed)) for seed in range(6)]
    for one in drawn:
        for site in neurons.sites:
            assert Counter(Counter(clusters(one, site)).values()) == Counter(Counter(clusters(grouped, site)).values())
    assert len({tuple(clusters(one, UP)) for one in drawn}) > 1
    assert not all(same_partition(clusters(one, UP), KINDS[UP]) for one in drawn)
    assert drawn[5].manifest.grouping == GroupConfig(method="random", seed=5).model_dump()


def test_one_and_untied(neurons: NeuronSet) -> None:
    assert clusters(group(neurons, GroupConfig(method="one")), GATE) == [0] * 7
    assert clusters(group(neurons, GroupConfig(method="untied")), GATE) == list(range(7))


def test_rows_that_are_all_alike_stay_one_group(tiny_loaded: LoadedModel, tiny_neurons: Any) -> None:
    alike = tiny_neurons.neuron_set(tiny_loaded, {GATE: torch.ones(6, 10)})
    assert clusters(group(alike, GroupConfig()), GATE) == [0] * 6


def test_drawn_rows_have_no_profiles_to_group_by(neurons: NeuronSet) -> None:
    drawn = random_rows(neurons, seed=0)
    with pytest.raises(PatchError, match=r"gate\.0 were drawn, not found, and have no profiles"):
        group(drawn, GroupConfig())
    assert clusters(group(drawn, GroupConfig(method="one")), GATE) == [0] * 7


def test_bad_settings_are_refused() -> None:
    for settings, message in (
        ({"method": "k-means"}, "'k-means' is not allowed"),
        ({"k_max": 1}, "k_max: 1 is not"),
        ({"k": 2, "method": "untied"}, "k is 2, but the method untied settles the number of groups; leave k out"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(settings, GroupConfig, origin="test")


def test_kmeans_needs_scikit_learn(neurons: NeuronSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtraError, match="scikit-learn is not installed"):
        group(neurons, GroupConfig())

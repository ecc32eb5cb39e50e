"""The refusal direction of a tiny model in which one word is written along one axis."""

from typing import Any

import pytest
import torch

from nest.attacks import direction_ablated
from nest.refusal_direction import (
    _first_logits,
    _log_odds,
    _refusal_tokens,
    _rendered,
    _tail_states,
    find_refusal_direction,
)
from spider_sense.errors import DataError
from spider_sense.models import LoadedModel


@pytest.fixture
def prompts(tiny_neurons: Any) -> tuple[Any, Any]:
    return tiny_neurons.prompt_rows(30, "w9", 0), tiny_neurons.prompt_rows(30, None, 1)


def test_it_is_a_unit_direction_out_of_the_layers_that_are_used(
    tiny_loaded: LoadedModel, prompts: tuple[Any, Any]
) -> None:
    tried: list[int] = []
    found = find_refusal_direction(tiny_loaded, *prompts, tried.append)
    assert float(found.direction_D.norm()) == pytest.approx(1.0)
    # The last fifth of two layers is left out.
    assert found.layer == 0
    assert found.position in (-1, -2, -3)
    assert 1 <= sum(tried) <= 12
    assert found.kl >= 0


def test_it_separates_the_classes_it_was_found_with(tiny_loaded: LoadedModel, prompts: tuple[Any, Any]) -> None:
    found = find_refusal_direction(tiny_loaded, *prompts)
    means = []
    for part in prompts:
        with torch.no_grad():
            states = _tail_states(tiny_loaded, _rendered(tiny_loaded, part), 3)
        means.append(float((states[:, found.layer, found.position] @ found.direction_D).mean()))
    assert means[0] > means[1]


def test_the_search_leaves_no_hooks_and_repeats(tiny_loaded: LoadedModel, prompts: tuple[Any, Any]) -> None:
    first, second = (find_refusal_direction(tiny_loaded, *prompts) for _ in range(2))
    assert torch.equal(first.direction_D, second.direction_D)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_loaded.model.modules())


def test_what_it_reports_is_what_ablation_does(tiny_loaded: LoadedModel, prompts: tuple[Any, Any]) -> None:
    found = find_refusal_direction(tiny_loaded, *prompts)
    rows, tokens = _rendered(tiny_loaded, prompts[0][-6:]), _refusal_tokens(tiny_loaded.tokenizer)
    with torch.no_grad():
        assert _log_odds(_first_logits(tiny_loaded, rows), tokens) == pytest.approx(found.refusal_before)
        with direction_ablated(tiny_loaded.model, found.direction_D):
            assert _log_odds(_first_logits(tiny_loaded, rows), tokens) == pytest.approx(found.refusal_after)


def test_too_few_prompts_are_refused(tiny_loaded: LoadedModel, prompts: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="9 harmful and 30 harmless prompts"):
        find_refusal_direction(tiny_loaded, prompts[0][:9], prompts[1])

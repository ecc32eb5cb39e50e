"""Changes inside experts: none changes nothing, one reaches its expert's tokens only, and no trace is left."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nest.inside_experts import changed_inside

MIXTURES = ("mixtral", "qwen3_moe")
IDS = torch.arange(3, 23).view(2, 10)
Model = Callable[[str], Any]


def kept(x_SD: Tensor, output_SF: Tensor) -> Tensor:
    return output_SF


def experts(model: Any, layer: int = 0) -> nn.Module:
    module: nn.Module = model.model.layers[layer].mlp.experts
    return module


def called(model: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """Run a fixed prompt, and return what the experts of the first block were given and what they put out."""
    seen: list[Any] = []
    handle = experts(model).register_forward_hook(lambda _, args, output: seen.extend((args, output)))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("name", MIXTURES)
def test_without_a_change_it_is_what_transformers_computes(name: str, tiny_model: Model) -> None:
    model = tiny_model(name)
    _, fast = called(model)
    model.set_experts_implementation("eager")
    _, eager = called(model)
    with changed_inside([(experts(model), 1, kept)]):
        _, found = called(model)
    assert torch.equal(found, eager)
    torch.testing.assert_close(found, fast, atol=1e-6, rtol=1e-5)


def test_a_change_reaches_the_tokens_of_its_expert_only(tiny_model: Model) -> None:
    model = tiny_model("mixtral")
    (_, chosen_TK, _), before = called(model)
    with changed_inside([(experts(model), 2, lambda x, y: y + 1)]):
        _, after = called(model)
    reached_T = (chosen_TK == 2).any(1)
    assert reached_T.any()
    assert not reached_T.all()
    assert torch.equal((after != before).any(1), reached_T)


def test_changes_of_one_expert_are_done_in_turn(tiny_model: Model) -> None:
    model = tiny_model("mixtral")
    with changed_inside([(experts(model), 2, lambda x, y: y * 0), (experts(model), 2, lambda x, y: y + 1)]):
        _, two = called(model)
    with changed_inside([(experts(model), 2, lambda x, y: torch.ones_like(y))]):
        _, one = called(model)
    assert torch.equal(one, two)


def test_a_block_inside_another_adds_to_its_changes(tiny_model: Model) -> None:
    model = tiny_model("mixtral")
    module, forward = experts(model), type(experts(model)).forward
    with changed_inside([(module, 2, lambda x, y: y * 0), (module, 1, lambda x, y: y - 1)]):
        _, outer = called(model)
        with changed_inside([(module, 2, lambda x, y: y + 1)]):
            _, nested = called(model)
        assert torch.equal(called(model)[1], outer)
    with changed_inside([(module, 2, lambda x, y: torch.ones_like(y)), (module, 1, lambda x, y: y - 1)]):
        _, together = called(model)
    assert torch.equal(nested, together)
    assert not torch.equal(nested, outer)
    assert module.forward.__func__ is forward  # type: ignore[attr-defined]


def test_an_expert_without_a_token_gives_a_gradient_of_zeros(tiny_model: Model) -> None:
    model = tiny_model("mixtral")
    added = nn.Parameter(torch.zeros(96))
    with changed_inside([(experts(model), 3, lambda x, y: y + added)]):
        hidden_TD, chosen_TK = torch.randn(5, 32), torch.tensor([[0, 1]] * 5)
        experts(model)(hidden_TD, chosen_TK, torch.full((5, 2), 0.5)).sum().backward()
    assert added.grad is not None
    assert not added.grad.any()


def test_no_trace_is_left_after_an_error_either(tiny_model: Model) -> None:
    model = tiny_model("mixtral")
    module: Any = experts(model)
    with pytest.raises(RuntimeError, match="stop"), changed_inside([(module, 0, kept)]):
        raise RuntimeError("stop")
    assert "forward" not in module.__dict__
    own = module.forward
    module.forward = own
    with changed_inside([(module, 0, kept)]):
        assert module.forward is not own
    assert module.forward is own

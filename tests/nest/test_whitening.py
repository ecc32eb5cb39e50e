"""Stepping in white coordinates: those of the inputs, steps that are AdamW's, weak directions that are learned."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nest.delta import Delta, Deltas, lora_deltas
from nest.lessons import Lesson
from nest.whitening import WhiteAdamW, read_roots
from spider_sense.experts import resolve_expert
from spider_sense.sites import resolve
from spider_sense.types import Site

# More than are read, so that some are left out.
LESSONS = [
    Lesson(tuple(range(5, 9 + place % 40)), (20 + place % 7, 30), "refuse" if place % 2 else "answer")
    for place in range(300)
]


def read(model: PreTrainedModel, module: nn.Module, lessons: list[Lesson]) -> Tensor:
    """Return the inputs of a projection, [T, D]."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    with torch.no_grad():
        for lesson in lessons:
            model(input_ids=torch.tensor([lesson.prompt + lesson.answer]))
    handle.remove()
    return torch.cat(seen)


def test_the_inputs_are_white_in_the_coordinates(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    modules = {place: resolve(model, Site.parse(place)).module for place in ("gate.0", "up.0", "gate.1")}
    deltas = lora_deltas(modules, 2, seed=0)
    roots = read_roots(model, deltas, LESSONS)
    gate, up, second = (roots[delta.down_KD] for delta in deltas)
    assert gate is up, "they read the same"
    for module, root_DD in ((modules["gate.0"], gate), (modules["gate.1"], second)):
        x_TD = read(model, module, LESSONS[::2])
        variance = x_TD.square().mean()
        strong_DD = (x_TD @ root_DD).T @ (x_TD @ root_DD) / len(x_TD) / variance
        share_D = strong_DD.diagonal()
        torch.testing.assert_close(strong_DD, share_D.diag(), atol=1e-3, rtol=0)
        assert share_D.max() < 1.01
        assert (share_D > 0.9).sum() >= 10
    assert not any(module._forward_hooks for module in model.modules())


def test_inputs_of_an_expert_are_those_that_the_router_sends_it(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("mixtral")
    places = [resolve_expert(model, Site(0, "up", expert)) for expert in range(4)]
    deltas = Deltas(
        Delta(one.module, torch.zeros(2, 32), torch.eye(96, 2), expert) for expert, one in enumerate(places)
    )
    roots = read_roots(model, deltas, LESSONS)
    assert len(roots) == 4
    first, second = list(roots.values())[:2]
    assert not torch.equal(first, second)
    one_token = Lesson((5,), (), "answer")
    assert len(read_roots(model, deltas, [one_token])) == model.config.num_experts_per_tok < 4, (
        "none for who got nothing"
    )


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_step_is_adamws_in_the_coordinates(decay: float) -> None:
    torch.manual_seed(0)
    root_DD, start_KD = torch.randn(5, 5), torch.randn(2, 5)
    white, other = nn.Parameter(start_KD.clone()), nn.Parameter(start_KD.clone())
    plain, tuned = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(start_KD.clone())
    ours = WhiteAdamW([white, other], {white: root_DD}, lr=0.1, weight_decay=decay)
    theirs = torch.optim.AdamW([plain], lr=0.1, weight_decay=0)
    untouched = torch.optim.AdamW([tuned], lr=0.1, weight_decay=decay)
    want_KD = start_KD
    for _ in range(3):
        gradient_KD, before_KD = torch.randn(2, 5), plain.detach().clone()
        white.grad, other.grad, tuned.grad = (gradient_KD.clone() for _ in range(3))
        plain.grad = gradient_KD @ root_DD
        for one in (ours, theirs, untouched):
            one.step()
        want_KD = want_KD * (1 - 0.1 * decay) + (plain.detach() - before_KD) @ root_DD.T
        torch.testing.assert_close(white.detach(), want_KD)
        assert torch.equal(other, tuned), "what has no coordinates is stepped as ever"
    white.grad = None
    ours.step()
    torch.testing.assert_close(white.detach(), want_KD)


def test_what_tells_inputs_apart_is_learned_in_fewer_steps() -> None:
    torch.manual_seed(0)
    y_T = torch.arange(200) % 2 * 2.0 - 1
    x_TD = torch.randn(200, 16) * torch.tensor([3.0, *[1.0] * 14, 0.1]) + torch.tensor([30.0, *[0.0] * 15])
    x_TD[:, 15] += 0.1 * y_T
    variance_D, direction_DD = torch.linalg.eigh(x_TD.T @ x_TD / 200)
    losses, root_DD = [], direction_DD / (variance_D / variance_D.mean()).sqrt()
    for white in (False, True):
        vector = nn.Parameter(torch.zeros(1, 16))
        optimizer = WhiteAdamW([vector], {vector: root_DD} if white else {}, lr=0.02)
        for _ in range(50):
            loss = nn.functional.softplus(-y_T * (x_TD @ vector[0])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0] - 0.1

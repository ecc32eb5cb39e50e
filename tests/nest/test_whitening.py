"""Stepping in white coordinates: those of the inputs, steps that are AdamW's, weak directions that are learned."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nest.delta import Delta, Deltas, lora_deltas
from nest.lessons import Lesson
from nest.whitening import WhiteAdamW, _spread, keep_bases, kept_bases, white_bases
from spider_sense.errors import ConfigError
from spider_sense.experts import resolve_expert
from spider_sense.sites import resolve
from spider_sense.types import Site

# More than are read, so that some are left out.
LESSONS = [
    Lesson(tuple(range(5, 9 + place % 40)), (20 + place % 7, 30), "refuse" if place % 2 else "answer")
    for place in range(300)
]


def additions(model: PreTrainedModel) -> Deltas:
    """Return rank 2 on three projections, of which two read the same."""
    return lora_deltas(
        {place: resolve(model, Site.parse(place)).module for place in ("gate.0", "up.0", "gate.1")}, 2, 0
    )


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
    deltas = additions(model)
    bases = white_bases(model, deltas, LESSONS)
    gate, up, second = (bases[delta.down_KD] for delta in deltas)
    assert gate is up, "they read the same"
    assert gate.is_contiguous(), "as NCCL asks for"
    chosen = _spread(LESSONS)
    assert [lesson.kind for lesson in chosen] == ["refuse"] * 64 + ["answer"] * 64
    for delta, base_DD in zip(list(deltas)[1:], (up, second), strict=True):
        x_TD = read(model, delta.target, chosen)
        variance_DD = (x_TD @ base_DD).T @ (x_TD @ base_DD) / len(x_TD) / x_TD.square().mean()
        kept_D = base_DD.any(0)
        torch.testing.assert_close(variance_DD, kept_D.float().diag(), atol=1e-4, rtol=0)
        assert kept_D.sum() > 16
    assert not any(module._forward_hooks for module in model.modules())


def test_directions_that_no_input_has_are_left_alone(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    deltas = additions(model)
    few = [Lesson((5, 6, 7, 8), (9,), "refuse"), Lesson((5, 6, 7, 8), (10,), "answer")]
    first = next(iter(deltas))
    base_DD, x_TD = white_bases(model, deltas, few)[first.down_KD], read(model, first.target, few)
    null_DN = torch.linalg.svd(x_TD).Vh[torch.linalg.matrix_rank(x_TD) :].T
    assert null_DN.shape[1] > 20
    assert (null_DN.T @ base_DD).abs().max() < 1e-4 < base_DD.abs().max()


def test_experts_are_refused(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("mixtral")
    module = resolve_expert(model, Site(0, "up", 1)).module
    deltas = Deltas([Delta(module, torch.zeros(2, 32), torch.eye(96, 2), 1)])
    with pytest.raises(ConfigError, match="set whiten: false"):
        white_bases(model, deltas, LESSONS)


def test_coordinates_are_read_as_they_were_kept(tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model("llama")
    deltas, again = additions(model), additions(model)
    bases = white_bases(model, deltas, LESSONS)
    keep_bases(tmp_path / "new" / "bases", deltas, bases)
    found = kept_bases(tmp_path / "new" / "bases", again)
    assert [found[one.down_KD].tolist() for one in again] == [bases[one.down_KD].tolist() for one in deltas]
    assert (tmp_path / "new" / "bases").stat().st_size < 3 * 32 * 32 * 4, "what two share is kept once"


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


def test_a_closure_is_asked_at_the_values_themselves() -> None:
    value = nn.Parameter(torch.ones(1, 2))
    optimizer = WhiteAdamW([value], {value: torch.eye(2)}, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert value.max() < 1


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


def test_a_projection_that_no_token_passes_has_no_coordinates(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("gemma3")
    tower = {name: one for name, one in model.named_modules() if "vision_tower" in name and name.endswith("q_proj")}
    with pytest.raises(ConfigError, match="a projection that the text never passes"):
        white_bases(model, lora_deltas(tower, 2, 0), LESSONS[:2])

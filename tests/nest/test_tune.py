"""Tuning: it learns what it is told, resumes bit for bit, and changes nothing else."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from nest.delta import Delta, Deltas, lora_deltas
from nest.forward import answer_logits
from nest.lessons import Lesson, collate
from nest.reference import divergence, read_reference
from nest.tune import Losses, TuneConfig, tune
from nest.whitening import _base
from spider_sense.config import parse
from spider_sense.errors import ConfigError, DataError, PatchError
from spider_sense.experts import resolve_expert
from spider_sense.layouts import is_mixture
from spider_sense.sites import resolve
from spider_sense.types import Site

CONFIG = TuneConfig(steps=12, batch_size=4, learning_rate=0.05, save_every=5)
LESSONS = [Lesson((5, 6, 7, 8, 9, 10 + i), (20 + i % 2, 30 + i), "refuse" if i % 2 else "answer") for i in range(8)]


def additions(model: nn.Module) -> Deltas:
    """Return rank 2 on two blocks, of a mixture in every expert."""
    if is_mixture(model, 0):
        sites = [Site(layer, "up", expert) for layer in (0, 1) for expert in range(4)]
        up_FK = torch.eye(96, 2)
        return Deltas(
            Delta(resolve_expert(model, site).module, torch.zeros(2, 32), up_FK, site.expert) for site in sites
        )
    return lora_deltas({str(layer): resolve(model, Site(layer, "up")).module for layer in (0, 1)}, 2, seed=0)


def values(deltas: Deltas) -> list[list[float]]:
    """Return all that is trained."""
    return [value.flatten().tolist() for value in deltas.parameters()]


@pytest.mark.parametrize(
    ("kind", "fall", "whiten"), [("llama", 0.3, False), ("llama", 0.3, True), ("mixtral", 0.05, False)]
)
def test_the_losses_fall_and_the_model_stays(
    kind: str, fall: float, whiten: bool, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model, config = tiny_model(kind), CONFIG.model_copy(update={"steps": 60, "whiten": whiten})
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    losses = tune(model, additions(model), LESSONS, config, pad=1)
    assert sum(loss.refuse for loss in losses[-5:]) < sum(loss.refuse for loss in losses[:5]) - 5 * fall
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert [loss.step for loss in losses] == list(range(60))


@pytest.mark.parametrize("whiten", [False, True])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(
    whiten: bool, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = tiny_model("llama"), CONFIG.model_copy(update={"whiten": whiten})
    whole, cut = additions(model), additions(model)
    tune(model, whole, LESSONS, config, pad=1)

    def stop(loss: object) -> None:
        if getattr(loss, "step", 0) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, cut, LESSONS, config, pad=1, folder=tmp_path / "run", advance=stop)
    # Another machine may find eigenvectors with other signs.
    monkeypatch.setattr("nest.whitening._base", lambda sum_DD: -_base(sum_DD))
    again = additions(model)
    losses = tune(model, again, LESSONS, config, pad=1, folder=tmp_path / "run")
    assert losses[0].step == 5
    assert values(again) == values(whole)
    assert tune(model, additions(model), LESSONS, config, pad=1, folder=tmp_path / "run") == []
    with pytest.raises(PatchError, match="settings"):
        tune(model, additions(model), LESSONS, config.model_copy(update={"seed": 1}), pad=1, folder=tmp_path / "run")


def test_a_step_in_passes_is_the_same_step(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    # Of different lengths, so that passes are padded otherwise and every mean is over other tokens.
    prompts = [(5, 6, *range(7, 8 + 2 * place)) for place in range(8)]
    lessons = [
        replace(one, prompt=prompt, answer=one.answer * (1 + place % 3))
        for place, (one, prompt) in enumerate(zip(LESSONS, prompts, strict=True))
    ]
    references = read_reference(model, lessons, pad=1)
    settings = {"batch_size": 8, "steps": 4, "learning_rate": 0.01, "kl_weight": 0.5, "answer_weight": 2.0}
    found = []
    for size in (8, 3, 1):
        change = additions(model)
        config = CONFIG.model_copy(update={**settings, "pass_size": size})
        losses = tune(model, change, lessons, config, pad=1, references=references)
        found.append((torch.cat([value.flatten() for value in change.parameters()]), losses))
    for value, losses in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-3, atol=2e-4)
        for one, other in zip(losses, found[0][1], strict=True):
            assert (one.refuse, one.answer, one.kl) == pytest.approx((other.refuse, other.answer, other.kl), abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_gradient_checkpointing_changes_nothing(kind: str, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model(kind)
    plain, saving = additions(model), additions(model)
    tune(model, plain, LESSONS, CONFIG, pad=1)
    tune(model, saving, LESSONS, CONFIG.model_copy(update={"gradient_checkpointing": True}), pad=1)
    assert not model.training
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_divergence_is_nothing_for_the_base_and_a_lower_bound_otherwise(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_model("llama")
    references = read_reference(model, LESSONS, pad=1, batch_size=3)
    assert sorted(references) == [0, 2, 4, 6]
    batch = collate(LESSONS, [0, 1, 2], pad=1)
    deltas = additions(model)
    for value in deltas.parameters():
        nn.init.normal_(value)
    with torch.no_grad():
        base = answer_logits(model, batch).log_softmax(-1)
        with deltas.hooked():
            moved = answer_logits(model, batch).log_softmax(-1)
    whole = (base.exp() * (base - moved)).sum(-1)[[0, 2]].sum()
    assert divergence(base, batch, references).item() == pytest.approx(0, abs=1e-5)
    assert 0 < divergence(moved, batch, references) <= whole + 1e-5
    assert divergence(moved, replace(batch, index_B=(1, 3, 5)), references) == 0


def test_an_anchor_keeps_the_base_nearer(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    references = read_reference(model, LESSONS, pad=1)
    far = []
    for weight in (1e-6, 10.0):
        config = CONFIG.model_copy(update={"kl_weight": weight, "answer_weight": 0.0, "steps": 40})
        far.append(tune(model, additions(model), LESSONS, config, pad=1, references=references)[-1].kl)
    assert far[1] < far[0] / 2
    assert not math.isnan(far[0])


@pytest.mark.parametrize("steps", [7, 9])
def test_numbers_that_are_not_finite_replace_no_checkpoint(
    steps: int, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """What is spoilt after step 6 shows in the loss of step 7, or, where there is none, in the check before the end."""
    model, folder = tiny_model("llama"), tmp_path / "run"
    config = CONFIG.model_copy(update={"steps": steps, "save_every": 2})
    change = additions(model)

    def spoil(losses: Losses) -> None:
        if losses.step == 6:
            next(iter(change.parameters())).data[0] = math.inf

    with pytest.raises(DataError, match=r"(the loss is nan at step 7|is not finite at step 6) .*; lower learning_rate"):
        tune(model, change, LESSONS, config, pad=1, folder=folder, advance=spoil)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    assert manifest["step"] == 6
    assert torch.isfinite(torch.stack([v.sum() for v in load_file(folder / "checkpoint.safetensors").values()])).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e300}, r"learning_rate: 1e\+300 is not allowed; input should be less than or equal to 1"),
        ({"learning_rate": 0}, "learning_rate: 0 is not allowed; input should be greater than 0"),
        ({"kl_weight": 1e300}, r"kl_weight: 1e\+300 is not allowed"),
        ({"answer_weight": 0}, "answer_weight and kl_weight are both 0, so nothing keeps benign prompts answered"),
    ],
)
def test_settings_that_cannot_be_tuned_with(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(settings, TuneConfig, origin="tune")


def test_a_divergence_alone_keeps_benign_answers() -> None:
    assert parse({"answer_weight": 0, "kl_weight": 0.5}, TuneConfig, origin="tune").kl_weight == 0.5


def test_bad_input(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match="of kind \\['refuse'\\]"):
        tune(model, additions(model), LESSONS[1::2], CONFIG, pad=1)
    broken = additions(model)
    next(iter(broken.parameters())).data[:] = math.nan
    with pytest.raises(DataError, match=r"the loss is nan at step 0 with learning rate 0\.05"):
        tune(model, broken, LESSONS, CONFIG, pad=1)
    with pytest.raises(DataError, match="no reference"):
        tune(model, additions(model), LESSONS, CONFIG.model_copy(update={"kl_weight": 1.0}), pad=1)

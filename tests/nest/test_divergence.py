"""KL from the base: zero for the same model, the plain formula for another, and the patch out and in again."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch

from nest.divergence import measure_divergence, patch_off
from spider_sense.chat import Chat
from spider_sense.errors import ConfigError, DataError
from spider_sense.models import LoadedModel
from spider_sense.patching import apply_patch

ANSWERS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


@pytest.fixture
def examples(tiny_neurons: Any) -> Any:
    return tiny_neurons.prompt_rows(3, None, 0)


@pytest.fixture
def changed(tiny_loaded: LoadedModel) -> LoadedModel:
    model = deepcopy(tiny_loaded.model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    return replace(tiny_loaded, model=model)


def test_a_model_is_at_no_distance_from_itself(tiny_loaded: LoadedModel, examples: Any) -> None:
    found = measure_divergence(tiny_loaded, examples, ANSWERS, base=tiny_loaded)
    assert found.nats == pytest.approx([0.0] * 3, abs=1e-6)
    assert found.per_token().value == pytest.approx(0.0, abs=1e-6)


def test_it_is_the_plain_formula(tiny_loaded: LoadedModel, changed: LoadedModel, examples: Any) -> None:
    found, chat = measure_divergence(changed, examples, ANSWERS, base=tiny_loaded), Chat(tiny_loaded.tokenizer)
    for example, answer, nats, tokens in zip(examples, ANSWERS, found.nats, found.tokens, strict=True):
        prompt = list(chat.render(example.text).ids)
        ids = prompt + tiny_loaded.tokenizer(answer)["input_ids"] + [tiny_loaded.tokenizer.eos_token_id]
        assert tokens == len(ids) - len(prompt)
        with torch.no_grad():
            p, q = (
                one.model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for one in (tiny_loaded, changed)
            )
        assert nats == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
        assert nats > 0
    assert found.per_token().value == pytest.approx(sum(found.nats) / sum(found.tokens))


def test_a_patch_is_compared_with_the_model_without_it(
    tiny_loaded: LoadedModel, tiny_patches: Any, examples: Any
) -> None:
    base = replace(tiny_loaded, model=deepcopy(tiny_loaded.model))
    applied = apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded), 3.0)
    patched = tiny_patches.weights(tiny_loaded.model)
    found = measure_divergence(tiny_loaded, examples, ANSWERS, off=lambda: patch_off(applied))
    assert found.nats == pytest.approx(measure_divergence(tiny_loaded, examples, ANSWERS, base=base).nats, rel=1e-5)
    assert sum(found.nats) > 0
    after = tiny_patches.weights(tiny_loaded.model)
    assert all(torch.equal(after[name], patched[name]) for name in patched)


def test_a_block_without_the_patch_ends_with_it_whatever_happens(tiny_loaded: LoadedModel, tiny_patches: Any) -> None:
    base = {name: value.clone() for name, value in tiny_patches.weights(tiny_loaded.model).items()}
    applied = apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded))
    patched = {name: value.clone() for name, value in tiny_patches.weights(tiny_loaded.model).items()}
    with patch_off(applied):
        assert all(torch.equal(value, base[name]) for name, value in tiny_patches.weights(tiny_loaded.model).items())
    with pytest.raises(RuntimeError, match="stop"), patch_off(applied):
        raise RuntimeError("stop")
    assert all(torch.equal(value, patched[name]) for name, value in tiny_patches.weights(tiny_loaded.model).items())
    applied.revert()


def test_bad_arguments_are_refused(tiny_loaded: LoadedModel, examples: Any) -> None:
    with pytest.raises(ConfigError, match="base model or a way"):
        measure_divergence(tiny_loaded, examples, ANSWERS)
    with pytest.raises(DataError, match="3 prompts and 1 answers"):
        measure_divergence(tiny_loaded, examples, ["w1"], base=tiny_loaded)

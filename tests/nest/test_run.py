"""From prompts and grouped neurons to a patch; the base model's answers are asked for once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from nest import curriculum
from nest.apply import write_patched
from nest.curriculum import make_curriculum, own_answers
from nest.group import GroupConfig, group
from nest.lessons import Lesson
from nest.model_folder import weights_digest
from nest.neurons import NeuronSet
from nest.reference import keep_references, kept_references, read_reference
from nest.revert import write_reverted
from nest.run import read_lessons, tune_patch
from nest.tune import TuneConfig
from spider_sense.errors import DataError, MismatchError
from spider_sense.fingerprint import fingerprint
from spider_sense.models import LoadedModel, load_model
from spider_sense.patch import NeuronPatch
from spider_sense.patching import apply_patch
from spider_sense.types import Site

CONFIG = TuneConfig(steps=6, batch_size=4, learning_rate=0.05, answer_tokens=5, kl_weight=0.5, save_every=3)


@pytest.fixture
def grouped(tiny_loaded: LoadedModel, tiny_neurons: Any) -> NeuronSet:
    """Six rows of two projections in groups."""
    profiles = {Site(0, "gate"): torch.randn(6, 8), Site(1, "up"): torch.randn(6, 8)}
    return group(tiny_neurons.neuron_set(tiny_loaded, profiles), GroupConfig(k=2))


def tuned(what: LoadedModel, neurons: NeuronSet, prompts: Any, folder: Path) -> NeuronPatch:
    """Tune on twelve prompts of either side."""
    harmful, benign = prompts(12, "w9", 0, "h"), prompts(12, None, 1, "b")
    with Progress(disable=True) as progress:
        return tune_patch(what, neurons, harmful, benign, CONFIG, folder, progress)


def test_the_patch_is_the_tuned_model(
    tiny_loaded: LoadedModel, grouped: NeuronSet, tiny_neurons: Any, tmp_path: Path
) -> None:
    ids, model = torch.arange(3, 12)[None], tiny_loaded.model
    with torch.no_grad():
        bare = model(input_ids=ids).logits
    patch = tuned(tiny_loaded, grouped, tiny_neurons.prompt_rows, tmp_path)
    with torch.no_grad():
        assert model(input_ids=ids).logits.equal(bare)
    assert set(patch.targets) == {Site(0, "gate"), Site(1, "up")}
    assert patch.manifest.trained_parameters == sum(one.vectors_KD.numel() for one in patch.targets.values())
    assert 0 < patch.manifest.trained_share < 0.05
    assert all(one.vectors_KD.abs().max() > 0 for one in patch.targets.values())
    assert patch.manifest.recipe["tune"]["steps"] == 6
    apply_patch(tiny_loaded, patch.save_pretrained(tmp_path / "patch"))
    with torch.no_grad():
        assert not model(input_ids=ids).logits.equal(bare)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_tuned_and_the_patch_is_the_tuned_model(
    name: str, tiny_model: Any, tiny_loaded: LoadedModel, tiny_neurons: Any, tmp_path: Path
) -> None:
    loaded = replace(tiny_loaded, model=tiny_model(name))
    profiles = {
        Site(0, "gate", 1): torch.randn(6, 8),
        Site(0, "up", 1): torch.randn(6, 8),
        Site(1, "up", 3): torch.ones(2, 8),
    }
    neurons = group(tiny_neurons.neuron_set(loaded, profiles), GroupConfig(k=2))
    before = weights_digest(loaded.model)
    patch = tuned(loaded, neurons, tiny_neurons.prompt_rows, tmp_path).save_pretrained(tmp_path / "patch")
    assert weights_digest(loaded.model) == before
    assert patch.targets.keys() == profiles.keys()
    assert patch.manifest.trained_parameters == 5 * 32
    assert all(one.vectors_KD.abs().max() > 0 for one in patch.targets.values())
    write_patched(loaded, patch, tmp_path / "patched")
    patched = load_model(str(tmp_path / "patched"))
    assert weights_digest(patched.model) != before
    write_reverted(tmp_path / "patched", tmp_path / "restored")
    assert weights_digest(load_model(str(tmp_path / "restored")).model) == before


def test_a_second_run_goes_on_from_the_first(
    tiny_loaded: LoadedModel, grouped: NeuronSet, tiny_neurons: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tuned(tiny_loaded, grouped, tiny_neurons.prompt_rows, tmp_path)

    def never(*_: object, **__: object) -> Any:
        raise AssertionError("it was done already")

    monkeypatch.setattr(curriculum, "generate_answers", never)
    monkeypatch.setattr("nest.run.read_reference", never)
    monkeypatch.setattr("nest.tune._step", never)
    again = tuned(tiny_loaded, grouped, tiny_neurons.prompt_rows, tmp_path)
    for site, target in first.targets.items():
        assert again.targets[site].vectors_KD.equal(target.vectors_KD)


def test_neurons_of_another_model_are_refused(
    tiny_loaded: LoadedModel, grouped: NeuronSet, tiny_neurons: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        next(iter(tiny_loaded.model.parameters())).add_(1)
    with pytest.raises(MismatchError, match="run `nest find` on this one"):
        tuned(tiny_loaded, grouped, tiny_neurons.prompt_rows, tmp_path)


def test_answers_survive_a_run_that_was_killed(tiny_loaded: LoadedModel, tiny_neurons: Any, tmp_path: Path) -> None:
    prompts, digest = tiny_neurons.prompt_rows(5, None, 0), fingerprint(tiny_loaded).weight_digest
    cache = tmp_path / "answers.jsonl"
    want = own_answers(tiny_loaded, prompts, digest, cache, 4, 99)
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(lines[:3]) + lines[3][:20])
    told: list[int] = []
    assert own_answers(tiny_loaded, prompts, digest, cache, 4, 99, told.append) == want
    assert told == [3, 2]
    assert own_answers(tiny_loaded, prompts, digest, cache, 4, 99) == want
    # Another length, or another model, is another question.
    assert len(own_answers(tiny_loaded, prompts, "other", cache, 4, 99)) == 5
    cache.write_text("not an answer\n" + "".join(lines))
    with pytest.raises(DataError, match="line 1: holds no answer"):
        own_answers(tiny_loaded, prompts, digest, cache, 4, 99)


def test_harmful_prompts_get_refusals_and_benign_ones_the_given_answers(
    tiny_loaded: LoadedModel, tiny_neurons: Any
) -> None:
    harmful, benign = tiny_neurons.prompt_rows(3, "w9", 0), tiny_neurons.prompt_rows(2, None, 1)
    lessons = make_curriculum(tiny_loaded, harmful, benign, ["w1 w2", "w3"], 99, 6)
    assert [lesson.kind for lesson in lessons] == ["refuse"] * 3 + ["answer"] * 2
    words = tiny_loaded.tokenizer.convert_tokens_to_ids(["w1", "w2", "<|im_end|>"])
    assert list(lessons[3].answer) == words


def test_distributions_are_kept_as_they_were_read(tiny_loaded: LoadedModel, tiny_neurons: Any, tmp_path: Path) -> None:
    harmful, benign = tiny_neurons.prompt_rows(3, "w9", 0), tiny_neurons.prompt_rows(4, None, 1)
    lessons = make_curriculum(tiny_loaded, harmful, benign, ["w1 w2", "w3", "w4 w5 w6", "w7"], 99, 5)
    read = read_reference(tiny_loaded.model, lessons, 0)
    keep_references(tmp_path / "kept.safetensors", read)
    kept = kept_references(tmp_path / "kept.safetensors")
    assert list(kept) == list(read)
    for place, one in kept.items():
        assert one.token_AK.equal(read[place].token_AK)
        assert one.log_AK.equal(read[place].log_AK)
        assert one.rest_A.equal(read[place].rest_A)


def test_where_nothing_was_answered_nothing_is_kept(
    tiny_loaded: LoadedModel, tiny_neurons: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nest.run.own_answers", lambda *_, **__: [""] * 4)
    monkeypatch.setattr("nest.run.make_curriculum", lambda *_: [Lesson((3, 4), (5,), "refuse")])
    prompts, found = tiny_neurons.prompt_rows, fingerprint(tiny_loaded)
    with Progress(disable=True) as progress:
        read = read_lessons(tiny_loaded, found, prompts(1, "w9", 0), prompts(4, None, 1), CONFIG, tmp_path, progress)
    assert read == ([Lesson((3, 4), (5,), "refuse")], {})
    assert not list(tmp_path.iterdir())

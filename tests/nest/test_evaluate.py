"""A whole evaluation of a tiny model: every part, its base, its attacks, and going on after a stop."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nest.answers import generate_answers
from nest.divergence import Divergence, measure_divergence
from nest.eval_config import ATTACKS, EvalConfig, EvalSets
from nest.evaluate import Arm, base_answers, evaluate
from nest.figures import differences
from nest.labelled_answers import sample_answers
from nest.measurements import Measurements
from nest.parts import PartStore
from nest.refusal_classifier import RefusalClassifier
from nest.tasks import Task, TaskRow
from spider_sense.errors import ConfigError, DataError
from spider_sense.models import LoadedModel
from spider_sense.patching import apply_patch
from spider_sense.types import Site

CONFIG = EvalConfig(limit=4, tokens=3, resamples=50, attacks=ATTACKS, keep_answers=True)
ROWS = {Site(0, "gate"): torch.tensor([1, 2]), Site(1, "up"): torch.tensor([7])}


@pytest.fixture
def sets(tiny_neurons: Any) -> EvalSets:
    rows = tiny_neurons.prompt_rows
    choice = TaskRow("a", "w1", ("w2", "w3"), 0)
    return EvalSets(
        harmful=tuple(rows(4, "w9", 0, "harm")),
        jailbreak=tuple(rows(3, "w9", 1, "wrap")),
        benign=tuple(rows(4, None, 2, "plain")),
        borderline=tuple(rows(3, None, 3, "edge")),
        wrapped=tuple(rows(2, None, 4, "wrapped")),
        spare_harmful=tuple(rows(12, "w9", 5, "harm")),
        spare_benign=tuple(replace(row, response="w3 w4") for row in rows(12, None, 6, "plain")),
        tasks=(
            Task("util_copa", "choice", (choice, replace(choice, id="b", gold=1))),
            Task("util_text", "documents", (TaskRow("d", "w1 w2 w3", (), 0), TaskRow("e", "w4 w5", (), 0))),
        ),
    )


@pytest.fixture(scope="module")
def judge() -> RefusalClassifier:
    return RefusalClassifier.fit(sample_answers())


def arm(loaded: LoadedModel, **changes: Any) -> Arm:
    return Arm(identity={"patch": "x"}, redetect=lambda *_: ROWS, base=loaded, **changes)


def test_every_figure_is_there_with_its_rows(
    tiny_loaded: LoadedModel, sets: EvalSets, judge: RefusalClassifier
) -> None:
    told: dict[str, tuple[int, int]] = {}

    def tell(part: str, done: int, total: int) -> None:
        told[part] = (told.get(part, (0, 0))[0] + done, total)

    result = evaluate(tiny_loaded, sets, CONFIG, arm=arm(tiny_loaded), classifier=judge, progress=tell)
    counts = {"asr": 4, "asr_jailbreak": 3, "over_refusal": 4, "over_refusal_borderline": 3, "over_refusal_wrapped": 2}
    for name, count in counts.items():
        assert result[name]["n"] == result[f"{name}_classifier"]["n"] == count
    assert result["utility"]["n"] == result["perplexity"]["n"] == 2
    assert result["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert set(result["attacks"]) == set(ATTACKS)
    assert result["attacks"]["fine_tuning"]["steps"] == 2
    assert result["attacks"]["neurons"]["neurons"] == 3
    assert result["attacks"]["ablation"]["layer"] == 0
    assert result["rows"]["harmful"]["ids"] == [f"harm/{one.id}" for one in sets.harmful]
    assert result["rows"]["harmful"]["answers"] == generate_answers(
        tiny_loaded, [one.text for one in sets.harmful], max_new_tokens=3
    )
    assert "written" in result["classifier_held_out"]
    assert all(done == total for done, total in told.values())
    assert {"harmful", "attack/prefill", "util_copa", "perplexity", "kl"} <= set(told)


def test_without_a_classifier_a_base_or_answers_these_are_left_out(tiny_loaded: LoadedModel, sets: EvalSets) -> None:
    result = evaluate(tiny_loaded, sets, EvalConfig(tokens=2, resamples=50))
    assert result["asr_classifier"] is None
    assert result["kl"] is None
    assert result["attacks"] == {}
    assert "answers" not in result["rows"]["harmful"]


def test_refusals_are_judged_by_both(
    tiny_loaded: LoadedModel, sets: EvalSets, judge: RefusalClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["I can't help with that.", "Sure, here is the plan:", "I won't do this.", "The Nile is a river."]
    monkeypatch.setattr("nest.measurements.generate_answers", lambda *_, **__: answers)
    only = EvalSets(harmful=sets.harmful, benign=sets.benign)
    result = evaluate(tiny_loaded, only, EvalConfig(tokens=2), classifier=judge)
    assert result["rows"]["harmful"]["refused"] == [True, False, True, False]
    assert result["rows"]["harmful"]["refused_classifier"] == [True, False, True, False]
    assert result["asr"]["value"] == result["over_refusal"]["value"] == 0.5


def test_a_patch_moves_the_model_from_its_base(tiny_loaded: LoadedModel, sets: EvalSets, tiny_patches: Any) -> None:
    base = replace(tiny_loaded, model=deepcopy(tiny_loaded.model))
    config = EvalConfig(tokens=3, resamples=50)
    plain = evaluate(base, sets, config, arm=Arm(identity={"patch": None}))
    apply_patch(tiny_loaded, tiny_patches.patch(tiny_loaded), 3.0)
    answers = base_answers(base, sets, config)
    patched = evaluate(tiny_loaded, sets, config, arm=Arm(identity={"patch": "x"}, base=base, base_answers=answers))
    assert patched["kl"]["value"] > 0
    change = differences(patched["rows"], plain["rows"])
    assert change["perplexity"]["value"] == pytest.approx(
        patched["perplexity"]["value"] / plain["perplexity"]["value"] - 1
    )
    assert change["asr"]["n"] == 4


def test_finished_parts_are_not_measured_again(
    tiny_loaded: LoadedModel, sets: EvalSets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tmp_path / "out.json", EvalConfig(tokens=2, resamples=50)
    first = evaluate(tiny_loaded, sets, config, arm=arm(tiny_loaded), store=PartStore(path))
    measured: list[str] = []
    judged = Measurements.judged

    def spy(self: Measurements, part: str, *rest: Any) -> dict[str, Any]:
        measured.append(part)
        return judged(self, part, *rest)

    monkeypatch.setattr(Measurements, "judged", spy)
    again = evaluate(tiny_loaded, sets, config, arm=arm(tiny_loaded), store=PartStore(path))
    assert measured == []
    assert again == first
    fewer = replace(sets, benign=sets.benign[:2])
    evaluate(tiny_loaded, fewer, config, arm=arm(tiny_loaded), store=PartStore(path))
    assert measured == ["benign"]
    other = Arm(identity={"patch": "y"})
    evaluate(tiny_loaded, EvalSets(harmful=sets.harmful), config, arm=other, store=PartStore(path))
    assert measured == ["benign", "harmful"]


def test_attacks_leave_the_model_as_it_was(tiny_loaded: LoadedModel, sets: EvalSets) -> None:
    prompts = [one.text for one in sets.harmful]
    before = generate_answers(tiny_loaded, prompts, max_new_tokens=6)
    evaluate(tiny_loaded, sets, CONFIG, arm=arm(tiny_loaded))
    assert generate_answers(tiny_loaded, prompts, max_new_tokens=6) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_loaded.model.modules())


def test_neurons_that_nobody_looks_for_are_refused_before_anything_runs(
    tiny_loaded: LoadedModel, sets: EvalSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measurements, "judged", lambda *_: pytest.fail("ran"))
    with pytest.raises(ConfigError, match="neurons"):
        evaluate(tiny_loaded, sets, CONFIG)


@pytest.mark.parametrize(
    ("kept", "what"), [("harmful", "logits of answers"), ("choice", "of choices"), ("documents", "of documents")]
)
def test_a_model_that_computes_no_numbers_is_not_measured(
    tiny_loaded: LoadedModel, sets: EvalSets, kept: str, what: str
) -> None:
    broken = replace(tiny_loaded, model=deepcopy(tiny_loaded.model))
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[7, 0] = float("nan")
    tasks = tuple(task for task in sets.tasks if task.kind == kept)
    chosen = EvalSets(harmful=sets.harmful) if kept == "harmful" else EvalSets(tasks=tasks)
    with pytest.raises(DataError, match=f"{what} are not all finite"):
        evaluate(broken, chosen, CONFIG.model_copy(update={"attacks": ()}))


def test_rounded_weights_are_not_fine_tuned(tiny_loaded: LoadedModel, sets: EvalSets) -> None:
    rounded = replace(tiny_loaded, model=deepcopy(tiny_loaded.model).to(torch.bfloat16))
    store, fine_tuning = PartStore(), CONFIG.model_copy(update={"attacks": ("fine_tuning",)})
    with pytest.raises(ConfigError, match=r"trains weights of torch\.bfloat16"):
        evaluate(rounded, sets, fine_tuning, store=store)
    assert not store.parts


def test_divergence_cuts_prompts_where_answers_were_asked_for(
    tiny_loaded: LoadedModel, sets: EvalSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"attacks": (), "max_prompt_tokens": 9})
    asked, compared = [], []

    def generate(*arguments: Any, **options: Any) -> list[str]:
        asked.append(options["max_prompt_tokens"])
        return generate_answers(*arguments, **options)

    def measure(*arguments: Any, **options: Any) -> Divergence:
        compared.append(options["max_prompt"])
        return measure_divergence(*arguments, **options)

    monkeypatch.setattr("nest.measurements.generate_answers", generate)
    monkeypatch.setattr("nest.measurements.measure_divergence", measure)
    evaluate(tiny_loaded, EvalSets(benign=sets.benign), config, arm=arm(tiny_loaded))
    assert set(asked) == set(compared) == {9}

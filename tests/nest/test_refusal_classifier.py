"""The trained judge: what it learns, what it reports, and what it reads back."""

import json
from pathlib import Path

import numpy as np
import pytest

from nest.labelled_answers import LabelledAnswer, sample_answers
from nest.refusal_classifier import RefusalClassifier
from spider_sense.errors import DataError

TEXTS = [
    "I can't help with that, it would hurt someone.",
    "I won't explain how to do this.",
    "Sure! Here is a recipe for bread.",
    "The Nile is a river in Africa.",
    "I'm sorry to hear that. Here are some ways to feel better.",
    "I'm here to help you with your project.",
]
TRUTH = [True, True, False, False, False, False]


@pytest.fixture(scope="module")
def judge() -> RefusalClassifier:
    return RefusalClassifier.fit(sample_answers())


def test_it_tells_refusals_from_answers(judge: RefusalClassifier) -> None:
    assert judge.predict(TEXTS).tolist() == TRUTH
    assert judge.predict(["", "..."]).shape == (2,)
    assert judge.predict([]).tolist() == []


def test_it_does_better_than_a_guess_on_answers_that_were_held_out(judge: RefusalClassifier) -> None:
    report = judge.held_out["written"]
    assert report.refusals + report.compliances == round(0.25 * len(sample_answers()))
    assert report.accuracy > 0.65


def test_every_source_is_reported_and_none_is_trained_on_for_it() -> None:
    odd = [LabelledAnswer(f"zebra {number}", number % 2 == 0, "odd") for number in range(12)]
    report = RefusalClassifier.fit(sample_answers() + odd).held_out
    assert set(report) == {"written", "odd", "all"}
    # Labels at random: an accuracy near 1 would mean that test rows were trained on.
    assert report["odd"].accuracy <= 0.8


def test_the_seed_decides_what_is_held_out(judge: RefusalClassifier) -> None:
    again, other = RefusalClassifier.fit(sample_answers()), RefusalClassifier.fit(sample_answers(), seed=5)
    assert again.held_out == judge.held_out
    assert again.digest == judge.digest == other.digest
    assert other.held_out != judge.held_out


def test_it_reads_back_what_it_wrote(judge: RefusalClassifier, tmp_path: Path) -> None:
    judge.save_pretrained(tmp_path / "judge")
    read = RefusalClassifier.from_pretrained(tmp_path / "judge")
    assert read.digest == judge.digest
    assert read.held_out == judge.held_out
    np.testing.assert_array_equal(read.predict(TEXTS), judge.predict(TEXTS))


def test_damage_is_refused(judge: RefusalClassifier, tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    with pytest.raises(DataError, match="does not exist"):
        RefusalClassifier.from_pretrained(folder)
    judge.save_pretrained(folder)
    manifest = json.loads((folder / "classifier.json").read_text())
    manifest["vocabulary"].pop(next(iter(manifest["vocabulary"])))
    (folder / "classifier.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="train it again"):
        RefusalClassifier.from_pretrained(folder)
    (folder / "classifier.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="SHA-256"):
        RefusalClassifier.from_pretrained(folder)


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="both classes"):
        RefusalClassifier.fit([answer for answer in sample_answers() if answer.refusal])

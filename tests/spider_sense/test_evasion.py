"""The held-out pairs, what each transform does to them, and the table."""

import base64
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from typer.testing import CliRunner

from spider_sense.cli import commands
from spider_sense.cli.app import app, console
from spider_sense.corpus import Language, load_corpus, load_evasion
from spider_sense.data import Example
from spider_sense.errors import DataError
from spider_sense.evasion import TRANSFORMS, evasion_table
from spider_sense.guard import Guard
from spider_sense.metrics import auroc
from spider_sense.models import LoadedModel
from spider_sense.offline import score_examples
from spider_sense.rates import clopper_pearson

assert "evade" in commands.__all__

ROW = Example(id="x-1", text="one two three four five six seven", label="benign", category="c", source="s", group="g")
FEW = ("plain", "diluted_1x", "diluted_64x")


def applied(name: str, example: Example = ROW) -> Example:
    result = TRANSFORMS[name](example)
    assert result is not None
    return result


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def overlap(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def test_forty_pairs_over_the_categories_of_the_corpus() -> None:
    rows = load_evasion()
    counts = Counter(row.category for row in rows)
    assert len(rows) == 80
    assert counts.keys() == {row.category for row in load_corpus() if row.source == "corpus_pairs"}
    assert min(counts.values()) >= 6
    for harmful, benign in zip(rows[::2], rows[1::2], strict=True):
        assert (harmful.label, benign.label) == ("harmful", "benign")
        assert (harmful.group, harmful.category) == (benign.group, benign.category)
        assert overlap(words(harmful.text), words(benign.text)) > 0.25
        assert 0.75 <= len(harmful.text.split()) / len(benign.text.split()) <= 4 / 3


def test_nothing_of_it_is_in_the_corpus() -> None:
    corpus = load_corpus()
    known = [words(row.text) for row in corpus]
    assert {row.source for row in load_evasion()} == {"corpus_evasion"}
    assert "corpus_evasion" not in {row.source for row in corpus}
    assert not {row.group for row in load_evasion()} & {row.group for row in corpus}
    for row in load_evasion():
        assert max(overlap(words(row.text), text) for text in known) < 0.5, row.text


def test_the_translations_are_of_the_same_rows_and_all_differ() -> None:
    sets = {language: load_evasion(language) for language in get_args(Language)}
    ids = [row.id for row in load_evasion()]
    assert len(set(ids)) == 80
    assert all([row.id for row in rows] == ids for rows in sets.values())
    assert len({row.text for rows in sets.values() for row in rows}) == 4 * 80


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_keeps_what_a_row_is_and_repeats_itself(name: str) -> None:
    for row in load_evasion():
        changed = applied(name, row)
        assert changed == applied(name, row)
        assert (changed.id, changed.label, changed.group) == (row.id, row.label, row.group)
        assert (changed.text == row.text) == (name == "plain")


@pytest.mark.parametrize("times", [1, 4, 16, 64])
def test_dilution_surrounds_the_prompt_by_so_many_words(times: int) -> None:
    before, _, after = applied(f"diluted_{times}x").text.partition(ROW.text)
    for side in (before, after):
        assert times * 3.5 <= len(side.split()) < times * 3.5 + 20
        assert side.strip().endswith(".")
    assert before != after


def test_both_sides_of_a_pair_stand_in_the_same_filler() -> None:
    harmful, benign = load_evasion()[:2]
    sides = [applied("diluted_16x", row).text.split(row.text) for row in (harmful, benign)]
    assert sides[0] == sides[1]
    other = load_evasion()[2]
    assert applied("diluted_16x", other).text.split(other.text)[0] != sides[0][0]


def test_filler_does_not_run_out_within_a_prompt() -> None:
    text = applied("diluted_16x").text.replace(ROW.text, "")
    sentences = re.split(r"(?<=\.)\s+", text.strip())
    assert len(sentences) == len(set(sentences)) > 8


def test_base64_can_be_decoded() -> None:
    code = applied("base64").text.rpartition(" ")[2]
    assert base64.b64decode(code).decode() == ROW.text


def test_a_translation_is_looked_up_by_id() -> None:
    row = load_evasion()[0]
    assert applied("german", row) == load_evasion("de")[0]
    assert TRANSFORMS["french"](ROW) is None


def test_turns_hold_every_word_once_and_end_with_the_user() -> None:
    turns = applied("spread_over_turns").turns
    assert turns is not None
    assert [role for role, _ in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert [content for role, content in turns if role == "user"] == ["one two", "three four five", "six seven"]


def test_role_play_quotes_the_prompt_whatever_is_in_it() -> None:
    text = 'a {brace} and a "quote"'
    example = Example(id="1", text=text, label="benign", category="", source="s", group="g")
    assert f'"{text}"' in applied("role_play", example).text


@pytest.fixture
def guard(guards: Any, tiny_loaded: LoadedModel) -> Guard:
    """Two detectors; half of the plain rows are above the suspect threshold, and long prompts are always clear."""
    probes = [guards.probe("misuse", "mean", "resid.1", seed=3), guards.probe("other", "max", "resid.0", seed=4)]
    peaks = score_examples(tiny_loaded, probes, load_evasion()).peak_NH[:, 0]
    low, high = np.quantile(peaks, [0.5, 0.8]).tolist()
    result: Guard = guards.guard(tiny_loaded, probes, guards.calibration(low, high, longer=(1e5, 1e6), bound=40))
    return result


@pytest.fixture
def few_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spider_sense.evasion.TRANSFORMS", {name: TRANSFORMS[name] for name in FEW})


def test_the_table_has_both_rates_at_the_thresholds_of_each_length(guard: Guard, tiny_loaded: LoadedModel) -> None:
    short = guard.manifest.detectors[0].calibration.thresholds(1)
    low, high = short.suspect.value, short.breach.value
    seen: list[int] = []
    table = evasion_table(guard, tiny_loaded, advance=seen.append)
    assert (table["detector"], list(table["transforms"])) == ("misuse", list(TRANSFORMS))
    assert sum(seen) == 80 * len(TRANSFORMS)
    for name, part in table["transforms"].items():
        rows = [applied(name, row) for row in load_evasion()]
        scored = score_examples(tiny_loaded, guard.probes[:1], rows, max_tokens=128)
        scores, labels = scored.peak_NH[:, 0], np.array([row.label == "harmful" for row in rows])
        assert (part["n"], part["auroc"]) == (80, auroc(scores, labels))
        assert part["tokens"] == int(np.median(scored.tokens))
        for level, value in (("suspect", low), ("breach", high)):
            flagged = (scores >= value) & (scored.tokens <= 40)
            for rate, side in (("tpr", labels), ("fpr", ~labels)):
                count = int(flagged[side].sum())
                interval = clopper_pearson(count, 40)
                want = {"value": count / 40, "low": interval.low, "high": interval.high}
                assert part["at_thresholds"][level][rate] == want
    plain, diluted = (table["transforms"][name]["at_thresholds"]["suspect"] for name in ("plain", "diluted_64x"))
    # Words that the tiny tokenizer does not know are all the same to it, so many rows tie.
    assert 0 < plain["fpr"]["value"] < 1
    assert (diluted["fpr"]["value"], diluted["tpr"]["value"]) == (0, 0)
    assert json.loads(json.dumps(table)) == table


@pytest.mark.usefixtures("few_transforms")
def test_rows_that_were_cut_are_counted(guard: Guard, tiny_loaded: LoadedModel) -> None:
    # The tiny model has 128 positions.
    table = evasion_table(guard, tiny_loaded)
    assert [part["cut"] for part in table["transforms"].values()] == [0, 0, 80]


@pytest.mark.usefixtures("few_transforms")
def test_another_detector_can_be_chosen(guard: Guard, tiny_loaded: LoadedModel) -> None:
    table = evasion_table(guard, tiny_loaded, "other")
    assert table["detector"] == "other"
    assert table["transforms"] != evasion_table(guard, tiny_loaded, "misuse")["transforms"]
    with pytest.raises(DataError, match=r"no detector 'misuze'.*did you mean 'misuse'"):
        evasion_table(guard, tiny_loaded, "misuze")


@pytest.mark.usefixtures("few_transforms")
def test_the_verb_prints_a_table_and_ends_with_json(
    guard: Guard, tiny_loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 160)
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: tiny_loaded)
    guard.save_pretrained(tmp_path / "guard")
    command = ["evade", "--guard", str(tmp_path / "guard"), "--model", "org/tiny"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1]) == evasion_table(guard, tiny_loaded)
    assert "Evasion of misuse" in done.output
    assert all(name in done.output for name in FEW)
    assert not CliRunner().invoke(app, command).output.rstrip().endswith("}")

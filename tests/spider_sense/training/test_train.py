"""A whole training run on a tiny model, and what becomes of a guard when a run fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spider_sense.baselines import load_baselines
from spider_sense.errors import ConfigError, DataError, GuardError
from spider_sense.evaluation import evaluate_folder
from spider_sense.guard import BASELINES, Guard
from spider_sense.monitor import Monitor
from spider_sense.offline import score_activations, score_examples
from spider_sense.policy import Policy
from spider_sense.training import collect as collecting
from spider_sense.training import train as training
from spider_sense.training.config import DetectorConfig
from spider_sense.training.parts import choose_parts
from spider_sense.training.sweep import site_sets
from spider_sense.training.train import train
from spider_sense.types import Site


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_guard_has_evidence_and_controls(tiny_run: Any) -> None:
    guard = Guard.from_pretrained(tiny_run.folder)
    (record,) = guard.manifest.detectors
    assert [item.name for item in guard.manifest.controls] == ["misuse.random_direction", "misuse.shuffled_labels"]
    assert len(guard.controls) == 2
    overall = record.evidence["overall"]
    systems = {"guard", "tfidf", "length", "random_direction", "shuffled_labels"}
    assert systems | {"beats_tfidf", "tpr_gain_over_tfidf", "at_thresholds", "roc"} <= set(overall)
    assert set(overall["roc"]) == systems
    assert overall["guard"]["n"] == 24
    assert set(record.evidence["files"]) == {"held_out"}
    assert ("warning" in overall) == (not overall["beats_tfidf"])
    assert record.family in ("logistic", "attention")
    assert len(load_baselines(tiny_run.folder / BASELINES / "misuse")) == 2


def test_manifest_says_what_was_done(tiny_run: Any) -> None:
    manifest = Guard.from_pretrained(tiny_run.folder).manifest
    about = manifest.training
    assert about["sources"] == ["traffic"]
    assert about["test_sources"] == ["held_out"]
    assert about["dropped_repeats"] == 3
    assert about["parts"]["train"] + about["parts"]["validation"] + about["parts"]["calibration"] == 61
    assert {row["family"] for row in about["sweep"]["misuse"]} == {"logistic", "attention"}
    assert manifest.fingerprint.base_model == "org/tiny"
    assert [config.dtype for config in manifest.certified] == ["float32"]
    assert all("tmp" not in str(value) for key, value in about["config"].items() if key in ("output", "work"))


def test_evaluation_reproduces_the_manifest(tiny_run: Any, tiny_training: Any) -> None:
    sets = choose_parts(tiny_run.config).test
    result = evaluate_folder(tiny_run.folder, tiny_run.loaded, sets, DetectorConfig().label_map)
    kept = Guard.from_pretrained(tiny_run.folder).manifest.detectors[0].evidence
    for name in ("guard", "tfidf", "length", "random_direction", "shuffled_labels", "at_thresholds"):
        assert result["overall"][name] == kept["overall"][name], name
    assert result["files"]["held_out"]["guard"] == kept["files"]["held_out"]


def test_second_run_captures_nothing_and_agrees(
    tiny_run: Any, tiny_training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any) -> None:
        raise AssertionError("a finished capture ran the model")

    monkeypatch.setattr(collecting, "_run", forward)
    config = tiny_run.config.model_copy(update={"output": tmp_path / "again"})
    again = train(config, loaded=tiny_run.loaded)
    assert again.guard.manifest.probes_digest == tiny_run.trained.guard.manifest.probes_digest
    assert again.results == tiny_run.trained.results


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"detectors": (DetectorConfig(positive=("injection",)),)}, DataError, "no positive example"),
        ({"breach_fpr": 0.2}, ConfigError, "breach_fpr=0.2 is above"),
        ({"test": ()}, None, ""),
    ],
)
def test_failing_run_leaves_the_old_guard(
    tiny_run: Any,
    tiny_training: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: Any,
    error: Any,
    message: str,
) -> None:
    train_config = tiny_training.config(tmp_path)
    Guard.from_pretrained(tiny_run.folder).save_pretrained(train_config.output)
    before = contents(train_config.output)
    if error is None:
        # The last thing that is written: everything else lies in the folder beside by then.
        error, message = OSError, "no space left"
        monkeypatch.setattr(training, "save_baselines", _no_space)
    with pytest.raises(error, match=message):
        train(train_config.model_copy(update=changes), loaded=tiny_run.loaded)
    assert contents(train_config.output) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"guard", "work", "traffic.jsonl", "held_out.jsonl"}


def _no_space(*_: Any) -> None:
    raise OSError("no space left")


def test_output_that_is_no_guard_is_not_replaced(tiny_run: Any, tiny_training: Any, tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="exists and is no guard"):
        train(tiny_training.config(tmp_path, output=tmp_path), loaded=tiny_run.loaded)
    assert {path.name for path in tmp_path.iterdir()} == {"traffic.jsonl", "held_out.jsonl"}


def test_parts_keep_test_texts_out_and_pairs_together(tiny_run: Any) -> None:
    parts = choose_parts(tiny_run.config)
    tested = {row.text for rows in parts.test.values() for row in rows}
    assert not tested & {row.text for row in parts.examples}
    # The pair of a repeated text goes as a whole, so that topics stay matched.
    assert parts.dropped == 3
    homes: dict[str, set[str]] = {}
    for row, part in zip(parts.examples, parts.part.tolist(), strict=True):
        homes.setdefault(row.group, set()).add(part)
    assert all(len(home) == 1 for home in homes.values())
    assert sum(len(list(rows)) for rows in parts.test.values()) == 24
    assert len(homes) < len(parts.examples)


def test_what_holds_half_of_a_test_text_is_left_out_with_its_pair(
    tiny_run: Any, tiny_training: Any, tmp_path: Path
) -> None:
    rows, held_out = tiny_training.rows(64, seed=1, pairs=10), tiny_training.rows(24, seed=2)
    before = choose_parts(tiny_training.config(tmp_path, **_sets(tiny_training, tmp_path, rows, held_out)))
    held_out[0]["text"] += " and then " + rows[0]["text"] + " at the end"
    after = choose_parts(tiny_training.config(tmp_path, **_sets(tiny_training, tmp_path, rows, held_out)))
    assert {row.id for row in before.examples} - {row.id for row in after.examples} == {
        f"traffic/{row['id']}" for row in rows[:2]
    }
    assert (before.dropped, after.dropped) == (0, 2)


def test_a_system_prompt_that_all_rows_share_is_no_overlap(tiny_training: Any, tmp_path: Path) -> None:
    frame = " ".join(f"rule{index}" for index in range(60))
    rows, held_out = tiny_training.rows(64, seed=1), tiny_training.rows(24, seed=2)
    framed = [
        [
            {key: value for key, value in row.items() if key != "text"}
            | {"messages": [{"role": "system", "content": frame}, {"role": "user", "content": row["text"]}]}
            for row in part
        ]
        for part in (rows, held_out)
    ]
    sets = _sets(tiny_training, tmp_path, *framed)
    parts = choose_parts(tiny_training.config(tmp_path, **sets))
    assert (len(parts.examples), parts.dropped) == (64, 0)
    written = [[row | {"text": f"{frame} {row['text']}"} for row in part] for part in (rows, held_out)]
    sets = _sets(tiny_training, tmp_path, *written)
    with pytest.raises(DataError, match=r"64 of 64 rows of traffic share half.*belongs into `messages`"):
        choose_parts(tiny_training.config(tmp_path, **sets))


def _sets(tiny_training: Any, folder: Path, rows: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Any:
    files = {"data": ("traffic", rows), "test": ("held_out", held_out)}
    return {
        name: (str(tiny_training.write_rows(folder / f"{file}.jsonl", content)),)
        for name, (file, content) in files.items()
    }


def test_each_detector_has_answered_conversations_to_calibrate_on(tiny_training: Any, tmp_path: Path) -> None:
    rows = tiny_training.rows(120, seed=1)
    for index, row in enumerate(rows):
        row["label"] = {"benign": ("benign", "everyday")[index // 2 % 2]}.get(row["label"], row["label"])
    kinds = [
        DetectorConfig(name=name, positive=("harmful",), negative=(negative,))
        for name, negative in (("misuse", "benign"), ("other", "everyday"))
    ]
    sets = _sets(tiny_training, tmp_path, rows, tiny_training.rows(24, seed=2))
    config = tiny_training.config(tmp_path, detectors=tuple(kinds), responses=4, test=(), data=sets["data"])
    parts = choose_parts(config)
    answered = parts.respond(config)
    for detector in kinds:
        used, positive = parts.labels(detector)
        calibrated = [row.id for row, wanted in zip(parts.examples, used & ~positive, strict=True) if wanted]
        calibration = {row.id for row, part in zip(parts.examples, parts.part, strict=True) if part == "calibration"}
        assert len(calibration.intersection(calibrated, answered)) == 4
    assert not parts.respond(config.model_copy(update={"respond": 0}))


def test_too_few_rows_for_the_parts(tiny_training: Any, tmp_path: Path) -> None:
    few = tiny_training.write_rows(tmp_path / "few.jsonl", tiny_training.rows(4, seed=3))
    with pytest.raises(DataError, match=r"the (validation|calibration|train) part has no (positive|negative) example"):
        choose_parts(tiny_training.config(tmp_path, data=(str(few),)))


def test_test_set_without_a_class_is_found_at_once(tiny_training: Any, tmp_path: Path) -> None:
    rows = [row for row in tiny_training.rows(24, seed=3) if row["label"] == "benign"]
    only = tiny_training.write_rows(tmp_path / "only.jsonl", rows)
    with pytest.raises(DataError, match="test part for misuse: no positive example"):
        choose_parts(tiny_training.config(tmp_path, test=(str(only),)))


def test_site_sets() -> None:
    sites = [Site(layer=layer, place="resid") for layer in range(8)]
    best = (sites[5],)
    alone, spread, everything = site_sets(sites, best)
    assert alone == best
    assert [site.layer for site in spread] == [2, 4, 5, 7]
    assert everything == tuple(sites)
    assert site_sets(sites[:1], (sites[0],)) == [(sites[0],)]
    assert site_sets(sites[:2], (sites[1],)) == [(sites[1],), tuple(sites[:2])]


def test_stored_activations_score_like_the_model(tiny_run: Any) -> None:
    guard, data = Guard.from_pretrained(tiny_run.folder), collecting.load(tiny_run.config.work)
    examples = choose_parts(tiny_run.config).examples
    stored = score_activations(guard.probes, data, np.arange(len(data.ids)), chunk=7)
    live = score_examples(tiny_run.loaded, guard.probes, examples, batch_tokens=100)
    assert data.ids == tuple(example.id for example in examples)
    assert np.array_equal(stored.tokens, live.tokens)
    answered = np.diff(data.starts) > data.prompt_rows
    assert answered.any()
    # What is stored has 11 bits. The model reads prompts alone here.
    np.testing.assert_allclose(stored.peak_NH[~answered], live.peak_NH[~answered], rtol=5e-3, atol=5e-3)
    assert (stored.peak_NH[answered] >= live.peak_NH[answered] - 5e-3 * (1 + np.abs(live.peak_NH[answered]))).all()


def test_offline_scores_are_the_streamed_ones(tiny_run: Any) -> None:
    guard = Guard.from_pretrained(tiny_run.folder)
    examples = choose_parts(tiny_run.config).test["held_out"][:6]
    offline = score_examples(tiny_run.loaded, guard.probes, examples)
    tokenizer, model = tiny_run.loaded.tokenizer, tiny_run.loaded.model
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": example.text}], add_generation_prompt=True, tokenize=False
        )
        for example in examples
    ]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    with Monitor(guard, Policy.shadow()).attach(model, tokenizer) as monitor, torch.inference_mode():
        model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=1, do_sample=False)
        streamed = np.array([case.peak for case in monitor.cases])
    assert np.abs(streamed - offline.peak_NH).max() <= 1e-5 * max(1.0, np.abs(offline.peak_NH).max())

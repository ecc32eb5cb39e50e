"""Thresholds set anew: on which rows, in which configuration, and what happens to the guard."""

import json
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from spider_sense.calibration import calibrate
from spider_sense.data import Example, read_jsonl
from spider_sense.errors import DataError, GuardError, MismatchError
from spider_sense.fingerprint import fingerprint, serving_config
from spider_sense.guard import BASELINES, Guard
from spider_sense.models import LoadedModel
from spider_sense.offline import score_examples
from spider_sense.signing import SIGNATURE
from spider_sense.training import collect as collecting
from spider_sense.training.canaries import make_canaries
from spider_sense.training.recalibration import benign_rows, recalibrate


@pytest.fixture
def guard(tiny_run: Any, tmp_path: Path) -> Path:
    """A copy, with the file that says it was signed."""
    Guard.from_pretrained(tiny_run.folder).save_pretrained(tmp_path / "guard")
    for path in (tiny_run.folder / BASELINES).rglob("*.*"):
        target = tmp_path / "guard" / path.relative_to(tiny_run.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "guard" / SIGNATURE).write_text("{}")
    return tmp_path / "guard"


@pytest.fixture
def traffic(tiny_training: Any, tmp_path: Path) -> dict[str, list[Example]]:
    """Seventy rows without labels, of which ten occur twice."""
    draw = Random(5)
    texts = [tiny_training.text(draw) for _ in range(60)]
    rows = [{"text": text} for text in texts + texts[:10]]
    return {"mine": read_jsonl(tiny_training.write_rows(tmp_path / "mine.jsonl", rows), require_label=False)}


def in_dtype(loaded: LoadedModel, dtype: Any) -> LoadedModel:
    return LoadedModel(model=deepcopy(loaded.model).to(dtype), tokenizer=loaded.tokenizer, source=loaded.source)


def test_rows_are_benign_and_counted_once(guard: Path, traffic: dict[str, list[Example]], tiny_training: Any) -> None:
    rows = benign_rows(guard, traffic)
    assert len(rows) == 60
    assert [row.text for row in rows] == [row.text for row in traffic["mine"][:60]]
    assert rows[0].id == "mine/mine-1"
    path = tiny_training.write_rows(guard.parent / "mixed.jsonl", tiny_training.rows(10, seed=1))
    with pytest.raises(DataError, match=r"5 of 80 rows are labelled .* misuse .*harmful.: 5.*benign traffic alone"):
        benign_rows(guard, {"mixed": read_jsonl(path), **traffic})


def test_thresholds_are_those_of_the_scores(
    guard: Path, traffic: dict[str, list[Example]], tiny_run: Any, tmp_path: Path
) -> None:
    rows = benign_rows(guard, traffic)
    done = recalibrate(guard, tiny_run.loaded, rows, tmp_path / "w", respond=0, suspect_fpr=0.2, breach_fpr=0.05)
    scored = score_examples(tiny_run.loaded, done.guard.probes, rows)
    expected = calibrate(scored.peak_NH[:, 0], scored.tokens, [row.id for row in rows], 0.2, 0.05)
    (record,) = done.guard.manifest.detectors
    found = record.calibration
    assert found.digest == expected.digest
    assert found.n == 60
    for mine, theirs in zip(found.buckets, expected.buckets, strict=True):
        assert mine.breach.value == pytest.approx(theirs.breach.value, abs=5e-3)
        assert mine.suspect.value == pytest.approx(theirs.suspect.value, abs=5e-3)
        assert (mine.breach.exceed, mine.breach.n) == (theirs.breach.exceed, theirs.breach.n)
    assert found != done.before["misuse"] == tiny_run.trained.guard.manifest.detectors[0].calibration


def test_responses_are_scored(guard: Path, traffic: dict[str, list[Example]], tiny_run: Any, tmp_path: Path) -> None:
    rows = benign_rows(guard, traffic)
    done = recalibrate(guard, tiny_run.loaded, rows, tmp_path / "w", out=tmp_path / "long", respond=8)
    about = done.guard.manifest.training["recalibrated_on"]
    data = collecting.load(tmp_path / "w")
    # A conversation whose answer is empty counts as well: its prompt is all of it.
    assert about["conversations"] == done.guard.manifest.detectors[0].calibration.n == 60
    assert about["with_response"] == (np.diff(data.starts) > data.prompt_rows).sum() > 0
    assert about["sources"] == ["mine"]
    assert about["replaces"] == Guard.from_pretrained(guard).digest
    short = recalibrate(guard, tiny_run.loaded, rows, tmp_path / "w2", out=tmp_path / "short", respond=0)
    pairs = [item.guard.manifest.detectors[0].calibration.buckets[-1].breach.value for item in (done, short)]
    # A maximum over more tokens is no smaller.
    assert pairs[0] >= pairs[1] - 5e-3


def test_only_the_new_configuration_is_certified(
    guard: Path, traffic: dict[str, list[Example]], tiny_run: Any, tmp_path: Path
) -> None:
    import torch

    half = in_dtype(tiny_run.loaded, torch.bfloat16)
    old = Guard.from_pretrained(guard)
    with pytest.raises(MismatchError, match="uncertified"):
        old.check_model(fingerprint(half), serving_config(half.model))
    done = recalibrate(guard, half, benign_rows(guard, traffic), tmp_path / "w", respond=2)
    assert [config.dtype for config in done.guard.manifest.certified] == ["bfloat16"]
    assert done.guard.manifest.canaries == make_canaries(half, done.guard.probes) != old.manifest.canaries
    done.guard.check_model(fingerprint(half), serving_config(half.model))
    with pytest.raises(MismatchError, match="uncertified"):
        done.guard.check_model(fingerprint(tiny_run.loaded), serving_config(tiny_run.loaded.model))
    back = recalibrate(guard, tiny_run.loaded, benign_rows(guard, traffic), tmp_path / "w", respond=2)
    assert back.guard.manifest.certified == old.manifest.certified


def test_another_weight_digest_of_another_configuration(
    guard: Path, traffic: dict[str, list[Example]], tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is quantised hashes differently; it becomes the model that the guard is for."""
    from spider_sense.training import recalibration

    serving = serving_config(tiny_run.loaded.model).model_copy(update={"quantization": "bitsandbytes-4bit"})
    found = fingerprint(tiny_run.loaded).model_copy(update={"weight_digest": "f" * 64})
    monkeypatch.setattr(recalibration, "serving_config", lambda _: serving)
    monkeypatch.setattr(recalibration, "fingerprint", lambda _: found)
    done = recalibrate(guard, tiny_run.loaded, benign_rows(guard, traffic), tmp_path / "w", respond=0)
    done.guard.check_model(found, serving)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_model_is_refused(
    guard: Path, traffic: dict[str, list[Example]], tiny_run: Any, tmp_path: Path, dtype: str
) -> None:
    import torch

    tuned = in_dtype(tiny_run.loaded, getattr(torch, dtype))
    with torch.no_grad():
        next(iter(tuned.model.parameters())).add_(1)
    before = (guard / "guard.json").read_bytes()
    with pytest.raises(MismatchError, match="weight_digest"):
        recalibrate(guard, tuned, benign_rows(guard, traffic), tmp_path / "w")
    assert (guard / "guard.json").read_bytes() == before
    assert not (tmp_path / "w").exists()


def test_guard_is_replaced_whole(guard: Path, traffic: dict[str, list[Example]], tiny_run: Any, tmp_path: Path) -> None:
    rows, old = benign_rows(guard, traffic), Guard.from_pretrained(guard)
    untouched = {path: path.read_bytes() for path in guard.rglob("*") if path.is_file()}
    other = recalibrate(guard, tiny_run.loaded, rows, tmp_path / "w", out=tmp_path / "other", respond=0)
    assert {path: path.read_bytes() for path in guard.rglob("*") if path.is_file()} == untouched
    same = recalibrate(guard, tiny_run.loaded, rows, tmp_path / "w", respond=0)
    for folder in (other.folder, same.folder):
        # The signature was of the old thresholds.
        assert not (folder / SIGNATURE).exists()
        assert (folder / BASELINES / "misuse" / "baselines.json").is_file()
    assert same.guard.manifest.probes_digest == old.manifest.probes_digest
    assert same.guard.vectors.keys() == old.vectors.keys()
    evidence = same.guard.manifest.detectors[0].evidence["overall"]
    assert "at_thresholds" in old.manifest.detectors[0].evidence["overall"]
    assert "at_thresholds" in json.dumps(old.manifest.detectors[0].evidence["groups"])
    assert "at_thresholds" not in json.dumps(same.guard.manifest.detectors[0].evidence)
    assert evidence["guard"] == old.manifest.detectors[0].evidence["overall"]["guard"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_folders_are_not_replaced(
    guard: Path, traffic: dict[str, list[Example]], tiny_run: Any, tmp_path: Path
) -> None:
    with pytest.raises(GuardError, match="exists and is no guard"):
        recalibrate(guard, tiny_run.loaded, benign_rows(guard, traffic), tmp_path / "w", out=tmp_path)
    assert not (tmp_path / "w").exists()


def test_kept_work_is_resumed(
    guard: Path, traffic: dict[str, list[Example]], tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any) -> None:
        raise AssertionError("a finished capture ran the model")

    rows = benign_rows(guard, traffic)
    first = recalibrate(guard, tiny_run.loaded, rows, tmp_path / "w", respond=3)
    monkeypatch.setattr(collecting, "_run", forward)
    second = recalibrate(guard, tiny_run.loaded, rows, tmp_path / "w", respond=3)
    assert second.guard.manifest.detectors == first.guard.manifest.detectors

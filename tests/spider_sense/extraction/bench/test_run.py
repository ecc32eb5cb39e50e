"""A whole bench on a table of vectors: every part runs, the report has its keys, nothing is done twice."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sense.extraction.bench import run as bench
from spider_sense.extraction.bench.config import BenchConfig, Cell, Groups, Parts
from spider_sense.extraction.bench.features import Features
from spider_sense.extraction.bench.report import summarise
from spider_sense.types import Site

WIDTH = 64


def _vector(text: str) -> np.ndarray:
    """A point that words decide: texts that share words lie close."""
    words = [
        np.random.default_rng(list(hashlib.sha256(word.encode()).digest())).standard_normal(WIDTH)
        for word in text.lower().split()[:12]
    ]
    mean: np.ndarray = np.mean(words, axis=0)
    return mean.astype(np.float32)


def _features(model: str, site: Site, texts: Sequence[str], **options: Any) -> Features:
    vectors = np.stack([_vector(text) for text in texts])
    return Features({text: row for row, text in enumerate(texts)}, vectors)


@pytest.fixture
def config(tmp_path: Path) -> BenchConfig:
    return BenchConfig(
        output=tmp_path,
        texts=12,
        real_principals=9,
        real_messages=20,
        seeds=(0,),
        principals=Parts(fit=12, calibrate=4, test=2),
        length=44,
        cells=(Cell(), Cell(start="pivot"), Cell(start="pivot", share=0.5)),
        attackers=1,
        warm_up=24,
        after=20,
        organisations=Groups(calibrate=3, test=2),
        ring_sizes=(3,),
        group_requests=20,
        load_principals=50,
        resamples=20,
        horizon=48,
        late=30,
        own_protocol=False,
    )


def test_a_bench_from_texts_to_report(config: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("river", reason="river is not installed; the extra extraction-bench has it")
    monkeypatch.delenv("SPIDER_SENSE_DATA", raising=False)
    monkeypatch.setattr(bench, "cached_features", _features)
    monkeypatch.setattr("spider_sense.extraction.bench.logit_sweep._REQUESTS", 60)
    monkeypatch.setattr("spider_sense.extraction.bench.logit_sweep._CLASSIFIERS", 3)
    monkeypatch.setattr("spider_sense.extraction.bench.load._SINGLES", 20)
    monkeypatch.setattr("spider_sense.extraction.bench.load._BATCHES", 2)
    said: list[str] = []
    results = bench.run_bench(config, said.append)
    report = summarise(results, config)
    json.dumps(report, allow_nan=False)
    scenes = {one.scene for one in results.outcomes if one.system == "spider-sense"}
    assert {"unseen families", "seen families", "no attack", "other work", "organisations", "ring of 3"} <= scenes
    assert {"innocent subject of 3", "innocent subject of 3, products"} <= scenes
    assert {"first 1 same", "pivot 1 same", "pivot 0.5 same", "drawn on to 48", "adaptive: paraphrased"} <= scenes
    assert {"pivot 1 same after 30", "pivot 0.5 same after 30", "no attack after 30", "other work after 30"} <= scenes
    assert set(report["baselines"]) == {
        *("rate limit", "PRADA", "near duplicates", "Mahalanobis", "coverage", "MMD", "ADWIN", "Page-Hinkley")
    }
    assert report["sweep"]["false_alarms"] == 0
    assert report["sweep"]["requests"]["300"] is not None
    assert report["bytes_per_principal"] > 0
    assert 0 < report["adaptive left"]["persona-matched"] < 0.3
    # Too few principals for any threshold: nothing may be alarmed, and nobody be found.
    assert report["lifetime_fpr"] == 0
    assert report["pivot_median_queries"] is None
    again: list[str] = []
    assert bench.run_bench(config, again.append).outcomes == results.outcomes
    assert len(again) < len(said)

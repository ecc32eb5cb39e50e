"""The report: medians, rates, who is missed; an infinite number is null."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spider_sense.config import load_yaml
from spider_sense.extraction.bench.config import BenchConfig
from spider_sense.extraction.bench.outcome import Outcome, read_outcomes, write_outcomes
from spider_sense.extraction.bench.report import OURS, summarise, worst_family
from spider_sense.extraction.bench.run import Results

CONFIG = Path(__file__).parents[4] / "configs" / "bench-extraction-quick.yaml"


def outcome(
    scene: str, alarm: int | None, family: str = "f", system: str = OURS, begin: int = 0, **more: Any
) -> Outcome:
    return Outcome(
        seed=0,
        system=system,
        embedding="hidden" if system == OURS else "wordllama",
        scene=scene,
        stratum="chat",
        family=family,
        length=200,
        alarm=alarm,
        begin=begin,
        template=True,
        **more,
    )


@pytest.fixture
def config() -> BenchConfig:
    return load_yaml(CONFIG, BenchConfig).model_copy(update={"resamples": 50})


def test_the_keys_say_what_was_found(config: BenchConfig, tmp_path: Path) -> None:
    rows = [outcome("unseen families", None, "calm") for _ in range(18)]
    rows += [outcome("unseen families", 9, "odd"), *(outcome("unseen families", None, "odd") for _ in range(5))]
    rows += [outcome("no attack", 100, begin=60), outcome("no attack", None, begin=60)]
    rows += [outcome("other work", 70, begin=60), outcome("other work", 70, begin=60, limit=130)]
    rows += [outcome("pivot 1 same", 60 + n, "list", begin=60) for n in (5, 7, 30)]
    rows += [outcome("pivot 0.5 same", n, "list", begin=60) for n in (70, None, None)]
    rows += [outcome("first 1 same", n, "list") for n in (16, 32, None)]
    rows += [outcome("first 1 same", None, "other") for _ in range(2)]
    rows += [outcome("ring of 10", n, "list") for n in (320, None)]
    rows += [outcome("organisations", None, score=n / 100) for n in range(20)]
    rows += [outcome("one subject", 64, score=n / 100) for n in range(20)]
    rows += [outcome("ring of 10", None, "list", score=0.185), outcome("ring of 10", None, "list", score=0.3)]
    rows += [outcome("pivot 1 same", None, "list", "PRADA", 60), outcome("first 1 same", 40, "list", "PRADA")]
    write_outcomes(tmp_path / "rows.jsonl", rows)
    assert read_outcomes(tmp_path / "rows.jsonl") == rows
    report = summarise(Results(rows, {"load": {"bytes_per_principal": 7, "updates_per_second": 8}}), config)
    assert report["lifetime_fpr"] == pytest.approx(1 / 24)
    assert report["lifetime_fpr_low"] < 1 / 24 < report["lifetime_fpr_high"]
    assert report["control_alarm_rate"] == 0.5
    assert report["pivot_median_queries"] == 7
    assert report["pivot_half_median_queries"] is None
    assert report["campaign_median_queries"] is None
    assert report["missed"]["first 1 same"] == ["other"]
    assert report["group_tpr"] == 0.25
    assert report["group_fpr"]["rate"] == 0
    assert report["group_fpr_one_subject"]["rate"] == 1
    assert report["group_curve"]["chat"]["0.01"] == {"all": 0.25, "template": 0.25}
    assert report["group_curve"]["chat"]["0.1"] == {"all": 0.5, "template": 0.5}
    assert report["other_work_alarm_rate"] == 1
    assert report["other_work_limited"]["rate"] == 0.5
    assert report["bytes_per_principal"] == 7
    assert report["baselines"]["PRADA"]["campaign_median_queries"] == 40
    assert report["baselines"]["PRADA"]["pivot_median_queries"] is None
    json.dumps(report, allow_nan=False)


def test_the_worst_family_is_named() -> None:
    rows = [outcome("unseen families", 3, "few") for _ in range(2)]
    rows += [outcome("unseen families", 3 if n == 0 else None, "many") for n in range(10)]
    assert worst_family(rows) == {"family": "many", "rate": 0.1, "principals": 10}
    assert worst_family([]) is None


def test_a_family_in_several_seeds_is_one_and_so_is_a_seed(config: BenchConfig) -> None:
    """What fails together must not count as many: of two families one is alarmed, in every seed; of two seeds one."""
    families = [
        replace(outcome("ring of 10", 9 if first == "hit" else None, f"{first}+{second}"), seed=seed)
        for seed in range(10)
        for first in ("hit", "missed")
        for second in "abcde"
    ]
    seeds = [
        replace(outcome("other work", 9 if seed else None, f"f{place}"), seed=seed)
        for seed in (0, 1)
        for place in range(100)
    ]
    rows = summarise(Results([*families, *seeds], {}), config)["systems"]
    assert {row["scene"]: (row["rate"], row["low"], row["high"]) for row in rows} == {
        "ring of 10": (0.5, 0, 1),
        "other work": (0.5, 0, 1),
    }

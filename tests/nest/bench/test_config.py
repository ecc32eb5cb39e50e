"""The comparison's settings."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nest.bench.config import BenchConfig
from nest.bench.plan import plan
from nest.bench.stage import expanded
from nest.tune import TuneConfig
from spider_sense.config import load_yaml, parse
from spider_sense.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
MINIMAL: dict[str, Any] = {
    "output": "runs/x",
    "tune_on": {"harmful": ["a.jsonl"], "benign": ["b.jsonl"]},
    "test_on": {"harmful": ["c.jsonl"], "benign": ["d.jsonl"]},
}


def test_the_shipped_configurations_are_read() -> None:
    for file in sorted(CONFIGS.glob("nest-bench*.yaml")):
        assert load_yaml(file, BenchConfig).arms
    assert load_yaml(CONFIGS / "nest-tune.yaml", TuneConfig).whiten


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["nest", "nets"]}, "unknown arm 'nets'; did you mean 'nest'"),
        ({"test_on": {"harmful": ["a.jsonl"], "benign": ["d.jsonl"]}}, "a.jsonl stand in tune_on as well"),
        ({"seeds": []}, "seeds"),
        ({"tune_on": {"harmful": [], "benign": ["b"]}}, "tune_on.harmful"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({**MINIMAL, **change}, BenchConfig, origin="bench")


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("SOMEWHERE", "/data")
    config = parse(MINIMAL, BenchConfig, origin="bench")
    files = config.tune_on.model_copy(update={"harmful": ("$SOMEWHERE/a.jsonl",)})
    assert expanded(files).harmful == ("/data/a.jsonl",)
    with pytest.raises(ConfigError, match=r"\$NOWHERE/a.jsonl: the environment variable is not set"):
        expanded(files.model_copy(update={"harmful": ("$NOWHERE/a.jsonl",)}))


def test_every_arm_runs_once_before_any_runs_again() -> None:
    config = parse({**MINIMAL, "seeds": [4, 5], "draws": 3, "arms": ["random_rows", "nest"]}, BenchConfig, origin="b")
    runs = list(plan(config))
    assert [run.arm for run in runs] == ["random_rows", "nest", "random_rows", "random_rows", "random_rows", "nest"]
    assert len({run.name for run in runs}) == len(runs)
    assert Counter(run.seed for run in runs) == {4: 4, 5: 2}

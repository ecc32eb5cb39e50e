"""The whole comparison on a tiny model: what it returns, and that a second call measures nothing again."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.progress import Progress
from typer.testing import CliRunner

from nest.bench import measure as measure_module
from nest.bench import stage as stage_module
from nest.bench.config import BenchConfig
from nest.bench.measure import Bench
from nest.bench.stage import set_stage
from nest.cli import app as app_module
from nest.cli import commands
from nest.eval_config import ATTACKS
from nest.measurements import base_answers
from spider_sense.config import parse
from spider_sense.errors import ConfigError, DataError
from spider_sense.models import LoadedModel, load_model

assert commands.__all__
ROOT = Path(__file__).parents[3]


@pytest.fixture
def settings(tiny_loaded: LoadedModel, tiny_neurons: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write prompt files and a configuration; every model that is asked for is the planted one."""
    planted: LoadedModel = tiny_neurons.plant(tiny_loaded)
    monkeypatch.setattr("nest.bench.stage.load_model", lambda *_: planted)
    for name, word, count in (("tune_h", "w9", 24), ("tune_b", None, 24), ("test_h", "w9", 12), ("test_b", None, 12)):
        rows = tiny_neurons.prompt_rows(count, word, len(name) + count)
        label = "harmful" if word else "benign"
        lines = [json.dumps({"text": row.text, "label": label, "id": f"{name}{i}"}) for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "util_copa.jsonl").write_text(
        "\n".join(json.dumps({"text": f"w{i} w2", "choices": ["w3", "w4 w5"], "gold": i % 2}) for i in range(6))
    )
    files = {name: [str(tmp_path / f"{name}.jsonl")] for name in ("tune_h", "tune_b", "test_h", "test_b")}
    config = {
        "model": "org/tiny",
        "output": str(tmp_path / "out"),
        "tune_on": {"harmful": files["tune_h"], "benign": files["tune_b"]},
        "test_on": {
            "harmful": files["test_h"],
            "benign": files["test_b"],
            "borderline": files["test_b"],
            "utility": [str(tmp_path / "util_copa.jsonl")],
        },
        "tune": {"steps": 4, "batch_size": 4, "kl_weight": 0.5, "answer_tokens": 6},
        "learning_rates": [0.001, 0.01],
        "learning_rates_of": {"full": [0.0001, 0.001]},
        "probe_steps": 2,
        "held_out": 4,
        "arms": ["nest", "random_rows", "full"],
        "seeds": [0, 1],
        "draws": 2,
        "alphas": [0.5, 1.0],
        "milestones": [0.25, 0.5],
        "evaluate": {"limit": 8, "tokens": 4, "kl_prompts": 4, "resamples": 50},
        "stress": ["random_rows"],
    }
    monkeypatch.setattr(measure_module, "ATTACKS", ("prefill",))
    monkeypatch.setattr(stage_module, "ATTACKS", ("prefill",))
    path = tmp_path / "bench.yaml"
    path.write_text(json.dumps(config))
    return path


def test_every_arm_is_measured_once(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(json.loads(settings.read_text())["output"])
    ask, answers = base_answers, dict[str, str]()

    def ask_once(*arguments: Any) -> dict[str, str]:
        if not answers:
            answers.update(ask(*arguments))
        return answers

    monkeypatch.setattr(measure_module, "base_answers", ask_once)

    def bench() -> dict[str, Any]:
        result = CliRunner().invoke(app_module.app, ["bench", "--config", str(settings)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        document: dict[str, Any] = json.loads(result.output.splitlines()[-1])
        return document

    line = bench()
    assert set(line) == {"base", "nest", "random_rows", "full", "frontier"}
    assert [line[arm]["runs"] for arm in ("nest", "random_rows", "full")] == [2, 3, 2]
    for arm in ("nest", "random_rows", "full"):
        assert 0 <= line[arm]["asr"] <= 1
        assert line[arm]["kl"] >= 0
        curves = line["frontier"][arm]
        assert set(curves["alpha"]) == {"0.5", "1"}
        assert set(curves["steps"]) == {"1", "2", "4"}
        assert curves["steps"]["4"] == curves["alpha"]["1"]
        assert curves["alpha"]["1"]["asr"]["low"] <= curves["alpha"]["1"]["asr"]["value"]
        assert line[arm]["seconds"] > 0
    assert set(line["frontier"]) == {"base", "nest", "random_rows", "full"}
    assert line["full"]["trained_share"] == pytest.approx(1.0)
    assert line["nest"]["trained_share"] < 0.1
    assert line["base"]["attacks"].keys() == {"prefill"}
    measured = sorted(file.name for file in (out / "frontier").glob("nest-*"))
    assert measured == [f"nest-seed0-draw0-{at}.json" for at in ("alpha0.5", "step1", "step2")], "the end is not again"
    assert (out / "frontier.png").stat().st_size > 10_000
    assert (out / "arms.png").stat().st_size > 10_000
    assert (out / "patches" / "nest-seed0-draw0" / "patch.json").is_file()

    def never(*_: object, **__: object) -> Any:
        raise AssertionError("a finished part was measured again")

    monkeypatch.setattr("nest.measurements.generate_answers", never)
    monkeypatch.setattr("nest.curriculum.generate_answers", never)
    monkeypatch.setattr("nest.tune._step", never)
    again = bench()
    assert again["nest"]["asr"] == line["nest"]["asr"]
    next((out / "snapshots").glob("full-*-step1.safetensors")).unlink()
    with pytest.raises(DataError, match="trained without keeping what it was after 1 steps; remove that folder"):
        bench()


def test_processes_measure_what_one_does(
    settings: Path, tiny_loaded: LoadedModel, tiny_neurons: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nest.bench.stage.load_model", load_model)
    planted: LoadedModel = tiny_neurons.plant(tiny_loaded)
    planted.model.save_pretrained(tmp_path / "model")
    planted.tokenizer.save_pretrained(tmp_path / "model")
    config = {**json.loads(settings.read_text()), "model": str(tmp_path / "model"), "arms": ["nest", "untied"]}
    config |= {"seeds": [0], "draws": 1, "stress": []}
    lines = {}
    for processes in (1, 2):
        settings.write_text(json.dumps({**config, "output": str(tmp_path / f"by{processes}")}))
        arguments = ["bench", "--config", str(settings), "--processes", str(processes)]
        result = CliRunner().invoke(app_module.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        lines[processes] = json.loads(result.output.splitlines()[-1])
    assert list(lines[2]) == list(lines[1]) == ["base", "nest", "untied", "frontier"]
    assert lines[2]["frontier"] == lines[1]["frontier"]
    for arm in ("base", "nest", "untied"):
        for name in ("asr", "over_refusal", "learning_rate", "intervals", "versus_base"):
            assert lines[2][arm].get(name) == lines[1][arm].get(name), (arm, name)
    spoilt = next((tmp_path / "by2" / "snapshots").glob("untied-*-step1.safetensors"))
    spoilt.unlink()
    with pytest.raises(DataError, match="trained without keeping what it was after 1 steps"):
        CliRunner().invoke(app_module.app, arguments, catch_exceptions=False)


def test_a_file_with_nothing_left_to_test_on_is_refused(settings: Path) -> None:
    config = json.loads(settings.read_text())
    seen = Path(config["tune_on"]["benign"][0])
    Path(config["test_on"]["borderline"][0]).write_text(seen.read_text())
    with pytest.raises(ConfigError, match=r"test_b\.jsonl: no prompt is left to test on"):
        CliRunner().invoke(app_module.app, ["bench", "--config", str(settings)], catch_exceptions=False)


def test_an_output_that_is_a_file_is_refused_before_work(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nest.bench.stage.load_model", lambda *_: pytest.fail("the model was loaded"))
    Path(json.loads(settings.read_text())["output"]).touch()
    with pytest.raises(ConfigError, match="out is a file; name another folder"):
        CliRunner().invoke(app_module.app, ["bench", "--config", str(settings)], catch_exceptions=False)


def test_an_arm_that_the_model_cannot_have_is_refused_before_anything_is_run(
    settings: Path, tiny_loaded: LoadedModel, tiny_model: Any, tiny_neurons: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tiny_neurons.plant_in_expert(replace(tiny_loaded, model=tiny_model("mixtral")), 2, [3, 11])
    monkeypatch.setattr("nest.bench.stage.load_model", lambda *_: planted)
    monkeypatch.setattr("nest.bench.stage.read_lessons", lambda *_: pytest.fail("the model was asked"))
    config = json.loads(settings.read_text())
    del config["arms"], config["learning_rates_of"]
    config |= {"find": {"z": 2.0}, "learning_rates": [0.001, 0.01, 0.1]}
    with pytest.raises(ConfigError, match="leave out arm 'lora_matched'"):
        set_stage(parse(config, BenchConfig, origin="bench"), Progress(disable=True))


def test_a_rate_that_no_arm_can_be_tuned_at_is_refused(settings: Path) -> None:
    config = json.loads(settings.read_text()) | {"learning_rates": [1e-3, 1e300]}
    with pytest.raises(ConfigError, match=r"learning_rates\.1: 1e\+300 is not allowed"):
        parse(config, BenchConfig, origin="bench")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"learning_rates_of": {"lora_matchd": [1e-3, 1e-2]}},
            "unknown arm 'lora_matchd'; did you mean 'lora_matched'",
        ),
        ({"arms": ["nest", "nest"]}, "'nest' stands there 2 times"),
        ({"seeds": [0, 0]}, "0 stands there 2 times"),
        ({"seeds": [-1]}, r"seeds\.0"),
        ({"alphas": [float("nan")]}, r"alphas\.0"),
        ({"evaluate": {"seed": -1}}, r"evaluate\.seed"),
        ({"tune": {"seed": -1}}, r"tune\.seed"),
    ],
)
def test_a_comparison_that_would_not_be_one_is_refused(settings: Path, wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(json.loads(settings.read_text()) | wrong, BenchConfig, origin="bench")


def test_arms_whose_rates_are_not_named_keep_their_own(settings: Path) -> None:
    config = json.loads(settings.read_text()) | {"learning_rates": [1e-3, 3e-3, 1e-2]}
    config["learning_rates_of"] = {"lora_matched": [1e-3, 1e-2, 1e-1]}
    read = parse(config, BenchConfig, origin="bench")
    assert read.rates_of("lora_matched") == (1e-3, 1e-2, 1e-1)
    assert max(read.rates_of("full")) < 1e-3 < max(read.rates_of("nest"))


def test_attacks_that_could_not_learn_are_refused_before_the_model_is_loaded(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "ATTACKS", ATTACKS)
    monkeypatch.setattr("nest.bench.stage.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match="are left for the attack"):
        set_stage(parse(json.loads(settings.read_text()), BenchConfig, origin="bench"), Progress(disable=True))


def test_a_file_on_both_sides_is_refused(settings: Path) -> None:
    config = json.loads(settings.read_text())
    config["test_on"]["harmful"] = config["tune_on"]["harmful"]
    with pytest.raises(Exception, match="stand in tune_on as well"):
        parse(config, BenchConfig, origin="bench")


def test_a_guard_adds_a_frontier(
    settings: Path, guards: Any, tiny_loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**json.loads(settings.read_text()), "arms": ["nest"], "seeds": [0], "draws": 1, "stress": []}
    settings.write_text(json.dumps(config))
    # The thresholds are below every score, so the patch is on for every request.
    everyone = guards.guard(tiny_loaded, guards.many_probes()[:1], guards.calibration(-1e6, -1e5))
    everyone.save_pretrained(tmp_path / "guard")
    spec = importlib.util.spec_from_file_location("guarded_patch", ROOT / "bench" / "guarded_patch.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    patched = []
    point = Bench.point

    def spy(self: Bench, name: str, changed: Any, *rest: Any, **options: Any) -> dict[str, Any]:
        result = point(self, name, changed, *rest, **options)
        if "-guard-" in name:
            patched.append([case.patched_from for case in changed.cases])
        return result

    monkeypatch.setattr(Bench, "point", spy)
    cli = typer.Typer()
    cli.command()(script.main)
    arguments = ["--config", str(settings), "--guard", str(tmp_path / "guard")]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    line = json.loads(result.output.splitlines()[-1])
    assert set(line["frontier"]) == {"base", "nest", script.LIVE, script.AGAIN, script.STOP}
    assert set(line["frontier"][script.LIVE]["alpha"]) == {"0.5", "1"}
    assert line["frontier"][script.AGAIN]["alpha"] == line["frontier"]["nest"]["alpha"], "everybody is suspected"
    assert line["frontier"][script.STOP]["alpha"]["1"]["asr"]["value"] == 0
    assert line["frontier"][script.STOP]["alpha"]["1"]["over_refusal"]["value"] == 1
    assert len(patched) == 2
    assert all(len(points) == 8 and all(point is not None for point in points) for points in patched)
    assert "generate" not in vars(tiny_loaded.model)
    refused, answered = ({judge: [on] for judge in ("refused", "refused_classifier")} for on in (True, False))
    assert script._mixed(refused, answered, [False]) == answered

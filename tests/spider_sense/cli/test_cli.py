"""The verbs on a tiny guard: what they print and what they leave behind."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from spider_sense.cli import commands
from spider_sense.cli.app import app, console
from spider_sense.cli.plain import plain
from spider_sense.guard import Guard

assert commands.__all__


@pytest.fixture
def guard(tiny_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "guard"))


@pytest.fixture(autouse=True)
def model(tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb gets the tiny model, whatever name it asks for."""

    def load(source: str, dtype: str = "float32", device: str = "cpu") -> Any:
        assert (dtype, device) == ("float32", "cpu")
        return tiny_run.loaded

    monkeypatch.setattr("spider_sense.models.load_model", load)
    monkeypatch.setattr("spider_sense.training.train.load_model", load)
    monkeypatch.setattr(console, "width", 160)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_every_verb_has_help() -> None:
    listed = run("--help").output
    for verb in ("train", "eval", "calibrate", "inspect", "serve", "sign", "verify"):
        assert verb in listed
        assert "Usage" in run(verb, "--help").output


def test_train(tiny_training: Any, tiny_run: Any, tmp_path: Path) -> None:
    config = tiny_training.config(tmp_path).model_dump(mode="json")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    output = run("train", "--config", tmp_path / "train.yaml").output
    assert "Validation, best" in output
    assert "Detector misuse" in output
    assert "shuffled_labels" in output
    warned = "does not beat TF-IDF" in output.replace("\n", " ")
    assert "rest on too little traffic" in output
    guard = Guard.from_pretrained(tmp_path / "guard")
    assert warned == ("warning" in guard.manifest.detectors[0].evidence["overall"])
    assert guard.manifest.probes_digest == tiny_run.trained.guard.manifest.probes_digest


def test_eval(guard: Path, tiny_run: Any, tiny_training: Any, tmp_path: Path) -> None:
    held_out = tiny_run.folder.parent / "held_out.jsonl"
    extra = tiny_training.write_rows(tmp_path / "extra.jsonl", [{"text": "w1 w2", "label": "unknown"}])
    result = run("eval", "--guard", guard, "--model", "x", "--data", held_out, extra, "--json")
    document = json.loads(result.output.splitlines()[-1])
    kept = Guard.from_pretrained(guard).manifest.detectors[0].evidence["overall"]
    assert document["overall"]["guard"] == kept["guard"]
    assert document["ignored"] == {"rows": 1, "labels": {"unknown": 1}}
    assert "ignored 1 rows" in result.output
    mapped = run(
        "eval", "--guard", guard, "--model", "x", "--data", held_out, "--data", extra, "--json",
        "--label", "unknown=positive",
    )  # fmt: skip
    assert json.loads(mapped.output.splitlines()[-1])["overall"]["guard"]["positives"] == kept["guard"]["positives"] + 1


def test_inspect(guard: Path) -> None:
    read = Guard.from_pretrained(guard)
    (record,) = read.manifest.detectors
    output = run("inspect", guard).output
    for expected in (
        read.digest,
        "org/tiny: LlamaForCausalLM, 2 layers of width 32",
        "dtype float32",
        record.family,
        f"{record.calibration.buckets[0].suspect.value:.3f}",
        f"{record.calibration.buckets[0].breach.value:.3f}",
        f"calibration {read.manifest.training['parts']['calibration']}",
        "traffic",
        "held_out",
        "random_direction",
        "refusal@",
    ):
        assert expected in output, expected
    flat = " ".join(output.split())
    assert "signature │ none" in flat
    assert ("does not beat TF-IDF" in flat) == ("warning" in record.evidence["overall"])
    (guard / "model.sig").write_text("{}")
    assert "present; check it with `spider-sense verify`" in " ".join(run("inspect", guard).output.split())


def test_inspect_json(guard: Path) -> None:
    read = Guard.from_pretrained(guard)
    document = json.loads(run("inspect", guard, "--json").output)
    assert document["digest"] == read.digest
    assert document["signed"] is False
    assert document["manifest"] == read.manifest.model_dump(mode="json")
    assert list(document["vectors"].values()) == [32]
    expected = {"attention": 12, "logistic": 1}[read.probes[0].family]
    assert document["state_floats"] == {"misuse": expected}


def test_inspect_shows_names_as_they_are(guard: Path) -> None:
    manifest = json.loads((guard / "guard.json").read_text())
    manifest["fingerprint"]["base_model"] = "[red]org[/red]/tiny"
    (guard / "guard.json").write_text(json.dumps(manifest))
    assert "[red]org[/red]/tiny" in run("inspect", guard).output


def test_outside_text_is_neither_markup_nor_control_characters() -> None:
    shown = plain("[red]a[/red]\x1b]52;c;x\x07\u202e")
    assert shown.plain == "[red]a[/red][U+001B]]52;c;x[U+0007][U+202E]"
    assert not shown.spans


def test_calibrate(guard: Path, tiny_training: Any, tmp_path: Path) -> None:
    draw = Random(7)
    texts = [{"text": tiny_training.text(draw)} for _ in range(55)]
    one = tiny_training.write_rows(tmp_path / "one.jsonl", texts[:30])
    two = tiny_training.write_rows(tmp_path / "two.jsonl", texts[30:] + texts[:5])
    arguments = ("calibrate", "--guard", guard, "--model", "x", "--data", one, two, "--respond", 4)
    output = run(*arguments, "--out", tmp_path / "new", "--breach-fpr", "0.04", "--work", tmp_path / "work").output
    assert "calibrated on 55 conversations, 5 repeats left out" in output.replace("\n", " ")
    assert str(tmp_path / "new") in output.replace("\n", "")
    assert (tmp_path / "work" / "capture.json").exists()
    old, new = (Guard.from_pretrained(tmp_path / name).manifest.detectors[0].calibration for name in ("guard", "new"))
    assert (new.n, new.suspect_fpr, new.breach_fpr) == (55, 0.05, 0.04)
    few = min(bucket.breach.n for bucket in new.buckets)
    assert f"rest on too little traffic, one on {few} where 74 are needed for 4.0%" in output
    for calibration in (old, new):
        assert f"{calibration.buckets[0].breach.value:.3f}" in output
    assert f"{new.buckets[0].breach.needed}" in output
    run(*arguments)
    assert Guard.from_pretrained(guard).manifest.detectors[0].calibration.n == 55
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"guard", "new", "work", "one.jsonl", "two.jsonl"}


def test_serve(guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.execve", lambda *what: started.extend(what))
    monkeypatch.setattr("spider_sense.serving.launch.check_installed", lambda: None)
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    given = ("--port", "80", "-tp", "2", "--additional-config", '{"other": 1}')
    run("serve", tmp_path, "--guard", guard, *given, "--audit", "a.jsonl", "--scores")
    program, command, environment = started
    assert command[:9] == [program, "-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path), *given[:4]]
    told = json.loads(command[command.index("--additional-config") + 1])
    assert told == {"other": 1, "spider_sense": {"guard": str(guard), "audit": "a.jsonl", "scores": True}}
    assert environment["VLLM_PLUGINS"] == "mine,spider_sense"


def test_sign_and_verify(guard: Path, tmp_path: Path) -> None:
    pytest.importorskip("OpenSSL", reason="model-signing imports it")
    pytest.importorskip("model_signing", reason="model-signing is not installed; the extra sign has it")
    assert "private.pem" in run("sign", "--generate-key", tmp_path / "me").output
    assert "model.sig" in run("sign", guard, "--key", tmp_path / "me.private.pem").output.replace("\n", "")
    assert "is as it was signed" in run("verify", guard, "--key", tmp_path / "me.public.pem").output.replace("\n", " ")
    assert json.loads(run("inspect", guard, "--json").output)["signed"] is True
    run("sign", guard, "--generate-key", tmp_path / "other")
    run("verify", guard, "--key", tmp_path / "other.public.pem")


@pytest.mark.parametrize(("rounds", "told"), [(4, False), (5, True)])
def test_a_bench_of_few_rounds_prints_no_intervals(rounds: int, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {"tokens_per_s": {"bare": 9.0, "guard": 8.0}, "guard_ratio": 0.889, "guard_interval": [0.8, 0.9]}
    monkeypatch.setattr("spider_sense.bench.bench", lambda *arguments: timed)
    lines = run("bench", "--model", "tiny", "--rounds", rounds).stdout.splitlines()
    (line,) = [line for line in lines if "guard:" in line]
    assert line.endswith("0.889 (0.800-0.900) of bare" if told else "tokens/s, 0.889 of bare")
    assert json.loads(lines[-1]) == timed

"""``nest eval`` and ``nest compare``: what they print and write, and what they refuse."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nest.cli import app as app_module
from nest.cli import commands, main
from spider_sense.models import LoadedModel

assert commands.__all__

Refuse = Callable[..., str]


@pytest.fixture
def loaded(tiny_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """The model that every verb gets, whatever name it asks for."""
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: tiny_loaded)
    monkeypatch.setattr(app_module.console, "width", 160)
    return tiny_loaded


@pytest.fixture
def files(tiny_neurons: Any, tmp_path: Path) -> dict[str, Path]:
    labels = {"harmful": "harmful", "jailbreak": "jailbreak", "benign": "benign", "borderline": "benign"}
    made = {}
    for seed, (name, label) in enumerate(labels.items()):
        examples = tiny_neurons.prompt_rows(20, "w9" if label == "harmful" else None, seed)
        rows = [{"id": one.id, "text": one.text, "label": label} for one in examples]
        made[name] = tmp_path / f"{name}.jsonl"
        made[name].write_text("\n".join(map(json.dumps, rows)))
    tasks = [{"text": f"w{n}", "choices": ["w2", "w3 w4"], "gold": n % 2} for n in range(4)]
    made["utility"] = tmp_path / "tasks"
    made["utility"].mkdir()
    (made["utility"] / "util_copa.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    documents = [{"text": f"w{n} w{n + 1} w{n + 2}"} for n in range(4)]
    (made["utility"] / "util_text.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return made


@pytest.fixture
def arguments(files: dict[str, Path], tmp_path: Path) -> list[object]:
    sets = [part for name in files for part in (f"--{name}", files[name])]
    sizes = ["--limit", 6, "--tokens", 2]
    return ["eval", "--model", "org/tiny", *sets, *sizes, "--out", tmp_path / "base.json"]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app_module.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def refuse(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Run a command that must fail, and return its error; it may leave nothing behind."""

    def run_refused(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["nest", *map(str, arguments)])
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        error = capsys.readouterr().err
        assert ended.value.code == 2, error
        assert error.startswith("error: "), error
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run_refused


def test_a_base_and_a_patch_then_both_side_by_side(
    loaded: LoadedModel, arguments: list[object], tmp_path: Path, tiny_patches: Any
) -> None:
    patch = tmp_path / "patch"
    tiny_patches.patch(loaded).save_pretrained(patch)
    output = run(*arguments, "--attacks", "prefill,ablation", "--phrases-only", "--json").output
    base = json.loads(output.splitlines()[-1])
    assert "rows" not in base
    assert base["asr"]["n"] == base["over_refusal"]["n"] == 6
    assert base["arm"]["patch"] is None
    assert base["kl"] is None
    assert "attack success, ablation" in output
    assert "perplexity" in output
    patched = [*arguments[:-1], tmp_path / "nest.json", "--patch", patch, "--phrases-only", "--json"]
    result = json.loads(run(*patched).output.splitlines()[-1])
    assert result["kl"]["value"] > 0
    assert result["arm"]["patch_bytes"] == sum(file.stat().st_size for file in patch.iterdir())
    assert result["arm"]["alpha"] == 1.0
    picture = tmp_path / "picture.png"
    shown = run("compare", tmp_path / "base.json", tmp_path / "nest.json", "--out", picture).output
    assert shown.count("nest") == 1
    assert "shares in points, perplexity in percent" in shown
    assert re.search(r"[+-]\d+\.\d% \([+-]\d+\.\d%, [+-]\d+\.\d%\)", shown), "perplexity's is a relative change"
    assert picture.read_bytes().startswith(b"\x89PNG")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert f"wrote {folder}.png" in run("compare", tmp_path / "base.json", "--out", folder).output


def test_a_second_run_measures_nothing(
    loaded: LoadedModel, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*arguments, "--phrases-only")
    first = (tmp_path / "base.json").read_bytes()
    monkeypatch.setattr("nest.measurements.generate_answers", lambda *_, **__: pytest.fail("answered again"))
    run(*arguments, "--phrases-only")
    assert (tmp_path / "base.json").read_bytes() == first


def test_a_run_that_asks_for_less_loses_nothing_and_says_so(
    loaded: LoadedModel, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*arguments, "--phrases-only")
    first = (tmp_path / "base.json").read_bytes()
    at = arguments.index("--jailbreak")
    less = run(*arguments[:at], *arguments[at + 2 :], "--phrases-only", "--json").output
    assert "not asked for, so no part of the figures, but kept in the file: jailbreak" in less
    line = json.loads(less.splitlines()[-1])
    assert line["asr_jailbreak"] is None
    assert not {"rows", "kept"} & set(line)
    assert list(json.loads((tmp_path / "base.json").read_bytes())["kept"]) == ["jailbreak"]
    monkeypatch.setattr("nest.measurements.generate_answers", lambda *_, **__: pytest.fail("answered again"))
    assert "kept in the file" not in run(*arguments, "--phrases-only").output
    assert (tmp_path / "base.json").read_bytes() == first


def test_what_is_replaced_is_named(loaded: LoadedModel, arguments: list[object]) -> None:
    assert "replaced, as of" not in run(*arguments, "--phrases-only").output
    output = run(*arguments, "--phrases-only", "--tokens", 3).output
    assert "replaced, as of another model or other settings: harmful, jailbreak, benign, borderline" in output


def test_the_judge_is_trained_once_and_kept(loaded: LoadedModel, arguments: list[object], tmp_path: Path) -> None:
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"text": f"w{n}", "label": "benign", "response": f"The answer is w{n}."} for n in range(8)]
    labelled.write_text("\n".join(map(json.dumps, [*rows, {"text": "w1 w2", "label": "benign"}])))
    output = run(*arguments, "--labelled", labelled, "--judge", tmp_path / "judge", "--json").output
    held_out = json.loads(output.splitlines()[-1])["classifier_held_out"]
    assert set(held_out) == {"written", "labelled", "all"}
    labelled.unlink()
    again = run(*arguments, "--judge", tmp_path / "judge", "--json").output
    assert json.loads(again.splitlines()[-1])["classifier_held_out"] == held_out


def test_bad_files_are_named(refuse: Refuse, arguments: list[object], tmp_path: Path, files: dict[str, Path]) -> None:
    swapped = [files["benign"] if argument == files["harmful"] else argument for argument in arguments]
    assert "no row for --harmful: the labels are ['benign']" in refuse(*swapped)
    assert "two files are called 'benign'" in refuse(*arguments, "--benign", files["benign"])
    assert "matches no file" in refuse(*arguments, "--jailbreak", str(tmp_path / "none*.jsonl"))
    assert "cannot read" in refuse(*arguments, "--benign", tmp_path / "none.jsonl")
    assert "cannot read" in refuse(*arguments, "--utility", tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no util_*.jsonl" in refuse(*arguments, "--utility", tmp_path / "empty")
    (tmp_path / "nothing.jsonl").write_text("\n")
    for part in ("harmful", "benign", "jailbreak", "labelled"):
        error = refuse(*arguments, f"--{part}", tmp_path / "nothing.jsonl")
        assert f"no prompt in 'nothing' of --{part}; name a file that has some" in error


def test_places_that_cannot_be_written_are_refused_before_work(
    refuse: Refuse, arguments: list[object], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert "benign.jsonl is a file; name another" in refuse(*arguments[:-1], files["benign"] / "base.json")
    assert "cannot be read as a result" in refuse(*arguments[:-1], files["utility"])
    assert "is no refusal classifier" in refuse(*arguments, "--judge", files["benign"])


def test_bad_values_are_named(refuse: Refuse, arguments: list[object], tmp_path: Path, files: dict[str, Path]) -> None:
    assert "unknown attack 'gcg'" in refuse(*arguments, "--attacks", "gcg")
    assert "--alpha 0.5 is the strength of a patch" in refuse(*arguments, "--alpha", 0.5, "--phrases-only")
    assert "is no refusal classifier" in refuse(*arguments, "--judge", files["utility"])
    assert "patch.json does not exist" in refuse(*arguments, "--patch", tmp_path / "none", "--phrases-only")
    (tmp_path / "notes.json").write_text("{}")
    assert "is no result of `nest eval`" in refuse(*arguments[:-1], tmp_path / "notes.json")


def test_a_patch_for_another_model_is_refused(
    refuse: Refuse, arguments: list[object], tmp_path: Path, loaded: LoadedModel, tiny_patches: Any
) -> None:
    patch = tiny_patches.patch(loaded)
    other = patch.manifest.base.model_copy(update={"weight_digest": "0" * 64})
    tiny_patches.patch(loaded, base=other).save_pretrained(tmp_path / "patch")
    assert "0" * 64 in refuse(*arguments, "--patch", tmp_path / "patch", "--phrases-only")


@pytest.mark.parametrize("attack", ["ablation", "neurons"])
def test_an_attack_without_spare_prompts_is_refused(refuse: Refuse, arguments: list[object], attack: str) -> None:
    error = refuse(*arguments, "--limit", 0, "--attacks", attack, "--phrases-only")
    assert "0 harmful and 0 benign prompts are left" in error


def test_results_that_cannot_be_compared_are_refused(refuse: Refuse, tmp_path: Path) -> None:
    assert "does not exist" in refuse("compare", tmp_path / "a.json", "--out", tmp_path / "p.png")
    (tmp_path / "a.json").write_text('{"schema": 1, "complete": false, "rows": {}}')
    assert "unfinished" in refuse("compare", tmp_path / "a.json", "--out", tmp_path / "p.png")
    (tmp_path / "a.json").write_text('{"schema": 1, "complete": true, "rows": {}, "asr": null}')
    assert "a has no asr" in refuse("compare", tmp_path / "a.json", "--out", tmp_path / "p.png")
    assert "cannot draw" in refuse("compare", tmp_path / "a.json", "--out", tmp_path / "p.png", "--against", "x")

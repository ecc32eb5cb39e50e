"""``nest find`` and ``nest group``: what they print, what they leave behind, and what they refuse."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from nest.cli import app as app_module
from nest.cli import commands, main
from nest.neurons import NeuronSet
from spider_sense.models import LoadedModel
from spider_sense.types import Site

assert commands.__all__

Refuse = Callable[..., str]


@pytest.fixture
def loaded(tiny_loaded: LoadedModel, tiny_neurons: Any, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """The planted model, which every verb gets whatever name it asks for."""
    planted: LoadedModel = tiny_neurons.plant(tiny_loaded)
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: planted)
    monkeypatch.setattr(app_module.console, "width", 160)
    return planted


@pytest.fixture
def files(tiny_neurons: Any, tmp_path: Path) -> dict[str, Path]:
    sides = {"harmful": tiny_neurons.prompt_rows(40, "w9", 0), "benign": tiny_neurons.prompt_rows(40, None, 1)}
    for side, examples in sides.items():
        rows = [{"text": example.text, "label": side} for example in examples]
        rows.append({"text": "w1", "label": "unknown"})
        (tmp_path / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {side: tmp_path / f"{side}.jsonl" for side in sides}


@pytest.fixture
def arguments(files: dict[str, Path], tmp_path: Path) -> list[object]:
    sides = ["--harmful", files["harmful"], "--benign", files["benign"]]
    return ["find", "--model", "org/tiny", *sides, "--out", tmp_path / "neurons"]


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
        assert f"\n{error}".count("\nerror: ") == 1, error
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run_refused


def test_find_then_group(loaded: LoadedModel, arguments: list[object], tmp_path: Path) -> None:
    output = run(*arguments).output
    neurons = NeuronSet.from_pretrained(tmp_path / "neurons")
    assert neurons.sites[Site(0, "gate")].neuron_R.tolist() == [3, 17]
    assert f"{neurons.count} of 192 rows ({neurons.share:.2%}) with z > 3 by probe" in output
    assert "40 harmful against 40 benign prompts" in output
    assert "left out by label: {'unknown': 1}" in output
    assert (tmp_path / "neurons" / "spread.png").is_file()
    output = run("group", tmp_path / "neurons", "--out", tmp_path / "groups", "--method", "untied").output
    grouped = NeuronSet.from_pretrained(tmp_path / "groups")
    assert f"{neurons.count} rows in {neurons.count} groups: {32 * neurons.count} numbers to tune" in output
    assert grouped.clusters == neurons.count
    assert grouped.manifest.recipe == neurons.manifest.recipe


def test_the_table_has_a_line_for_each_layer(loaded: LoadedModel, arguments: list[object], tmp_path: Path) -> None:
    lines = [line.split() for line in run(*arguments).output.splitlines()]
    cells = {line[0]: line[1:] for line in lines if line and line[0] in ("0", "1")}
    modules = NeuronSet.from_pretrained(tmp_path / "neurons").manifest.modules
    for layer in ("0", "1"):
        found = [modules[f"{place}.{layer}"] for place in ("gate", "up")]
        expected = [(str(one.selected), "48", f"{one.held_out_auroc:.3f}") for one in found]
        assert cells[layer] == [*expected[0], *expected[1]]


def test_options_reach_the_recipe(loaded: LoadedModel, arguments: list[object], tmp_path: Path) -> None:
    options = ["--recipe", "effect_size", "--z", 2, "--limit", 30, "--seed", 5, "--batch-size", 7, "--max-tokens", 64]
    run(*arguments, *options, "--utility", tmp_path / "benign.jsonl")
    manifest = NeuronSet.from_pretrained(tmp_path / "neurons").manifest
    expected = {"recipe": "effect_size", "z": 2.0, "seed": 5, "batch_size": 7, "max_tokens": 64, "minus_utility": True}
    assert expected.items() <= manifest.recipe.items()
    assert (manifest.prompts.harmful, manifest.prompts.benign, manifest.prompts.utility) == (30, 30, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "prob"], "recipe: 'prob' is not allowed"),
        (["--z", "-1"], "z: -1.0 is not allowed"),
        (["--max-tokens", "2"], "max_tokens is 2, and the chat template alone needs"),
        (["--limit", "5"], "5 harmful prompts are too few"),
        (["--z", "30"], "no row is left with a z-score above 30"),
        (["--harmful", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, refuse: Refuse, arguments: list[object]) -> None:
    assert message in refuse(*arguments, *options).replace("\n", " ")


def test_a_folder_of_tasks_is_spared_like_its_files(
    loaded: LoadedModel, arguments: list[object], tiny_neurons: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for seed in (2, 3):
        rows = [{"text": one.text, "choices": ["w1", "w2"]} for one in tiny_neurons.prompt_rows(20, None, seed)]
        (folder / f"util_{seed}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(*arguments, "--utility", folder)
    assert NeuronSet.from_pretrained(tmp_path / "neurons").manifest.prompts.utility == 40


def test_a_folder_without_tasks_is_refused(refuse: Refuse, arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    assert "tasks holds no util_*.jsonl" in refuse(*arguments, "--utility", tmp_path / "tasks")


def test_a_side_without_prompts_is_refused(refuse: Refuse, files: dict[str, Path], tmp_path: Path) -> None:
    sides = ["--harmful", files["benign"], "--benign", files["benign"]]
    error = refuse("find", "--model", "x", *sides, "--out", tmp_path / "neurons")
    assert "no harmful prompt in" in error


def test_a_folder_of_something_else_is_refused_before_work(
    refuse: Refuse, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert "is no set of neurons" in refuse(*arguments[:-1], tmp_path)
    assert "is no set of neurons" in refuse(*arguments[:-1], tmp_path / "benign.jsonl")
    assert "benign.jsonl is a file; name another folder" in refuse(*arguments[:-1], tmp_path / "benign.jsonl" / "out")


def test_a_mixture_is_counted_by_layer_and_says_what_was_left_out(
    arguments: list[object],
    loaded: LoadedModel,
    tiny_model: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("mixtral")
    # Nothing is routed to the last expert of layer 0.
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, out: (*out[:2], out[2].clamp(max=2)))
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: replace(loaded, model=model))
    output = run(*arguments, "--z", "2").output
    assert "left out: 2 of 16 projections, in experts that fewer than 8 harmful or 8 benign prompts reach, or" in output
    assert re.search(r"^ *0 .* 3 of 4 *$", output, re.MULTILINE)
    assert re.search(r"^ *1 .* 4 of 4 *$", output, re.MULTILINE)
    assert "median held-out AUROC" in output
    assert (tmp_path / "neurons" / "spread.png").is_file()


def test_a_number_of_groups_that_some_projections_have_no_rows_for(
    refuse: Refuse, loaded: LoadedModel, tiny_neurons: Any, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    profiles = {Site(0, "gate"): torch.randn(6, 20, generator=generator), Site(0, "up"): torch.ones(5, 20)}
    tiny_neurons.neuron_set(loaded, profiles).save_pretrained(tmp_path / "neurons")
    error = refuse("group", tmp_path / "neurons", "--out", tmp_path / "groups", "--k", 500)
    assert "k is 500, which takes a projection of 1000 rows" in error
    output = run("group", tmp_path / "neurons", "--out", tmp_path / "groups", "--k", 3).output
    assert "1 of 2 projections have too few different rows for 3 groups of two: each is one group" in output
    assert "too few" not in run("group", tmp_path / "neurons", "--out", tmp_path / "groups").output


def test_group_refuses_what_is_no_set_of_neurons(refuse: Refuse, tmp_path: Path) -> None:
    assert "neurons.json does not exist" in refuse("group", tmp_path, "--out", tmp_path / "groups")
    assert "method: 'k' is not allowed" in refuse("group", tmp_path, "--out", tmp_path / "groups", "--method", "k")

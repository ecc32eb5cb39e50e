"""``nest tune``: what it writes, and what it refuses before any work."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nest.cli import main
from nest.forward import answer_logits
from nest.group import GroupConfig, group
from spider_sense.models import LoadedModel
from spider_sense.patch import NeuronPatch
from spider_sense.types import Site

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def arguments(
    tiny_loaded: LoadedModel, tiny_neurons: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: tiny_loaded)
    profiles = {Site(0, "gate"): torch.randn(6, 8, generator=torch.Generator().manual_seed(0))}
    group(tiny_neurons.neuron_set(tiny_loaded, profiles), GroupConfig(k=2)).save_pretrained(tmp_path / "groups")
    for side, word in (("harmful", "w9"), ("benign", None)):
        rows = [json.dumps({"text": one.text}) for one in tiny_neurons.prompt_rows(8, word, 0)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(rows))
    sides = [part for side in ("harmful", "benign") for part in (f"--{side}", tmp_path / f"{side}.jsonl")]
    rest = ["--config", tmp_path / "tune.yaml", "--work", tmp_path / "work", "--out", tmp_path / "patch"]
    return ["tune", tmp_path / "groups", "--model", "org/tiny", *sides, *rest]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command with settings of tuning, and return its exit status and what it printed."""

    def run(arguments: list[Any], **settings: float) -> tuple[int, str]:
        (tmp_path / "tune.yaml").write_text(json.dumps({"steps": 4, "batch_size": 4, "answer_tokens": 4, **settings}))
        monkeypatch.setattr(sys, "argv", ["nest", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out + shown.err

    return run


def test_a_patch_is_written(call: Call, arguments: list[Any], tmp_path: Path) -> None:
    status, output = call(arguments)
    assert status == 0, output
    manifest = NeuronPatch.from_pretrained(tmp_path / "patch").manifest
    assert manifest.trained_parameters == 64
    refuse, answer, _ = manifest.evidence["last_losses"][0]
    assert f"losses of the last step, nats a token: refusals {refuse:.2f}, answers {answer:.2f}\n" in output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e300}, "learning_rate: 1e+300 is not allowed; input should be less than or equal to 1"),
        ({"answer_weight": 0, "kl_weight": 0}, "answer_weight and kl_weight are both 0"),
    ],
)
def test_bad_settings_are_refused(
    call: Call, arguments: list[Any], settings: Any, message: str, tmp_path: Path
) -> None:
    status, output = call(arguments, **settings)
    assert status == 2
    assert f"error: {tmp_path / 'tune.yaml'}: {message}" in output


def test_a_loss_that_is_not_finite_ends_without_a_patch(
    call: Call, arguments: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter([1.0, 1.0, math.nan])
    monkeypatch.setattr("nest.objective.answer_logits", lambda *asked: next(steps) * answer_logits(*asked))
    status, output = call(arguments, learning_rate=0.5, save_every=1)
    assert status == 2
    assert "error: the loss is nan at step 2 with learning rate 0.5; lower learning_rate" in output
    assert not (tmp_path / "patch").exists()
    (kept,) = (tmp_path / "work").glob("checkpoint-*/checkpoint.json")
    assert json.loads(kept.read_text())["step"] == 2


@pytest.mark.parametrize("option", ["--out", "--work"])
def test_what_cannot_be_written_is_refused_before_work(
    call: Call, arguments: list[Any], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spider_sense.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    arguments[arguments.index(option) + 1] = tmp_path / "benign.jsonl" / "deep"
    status, output = call(arguments)
    assert status == 2
    assert "benign.jsonl is a file; name another folder" in output

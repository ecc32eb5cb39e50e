"""Whatever is wrong with the input: one clear error, exit code 2, and nothing half-written."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from spider_sense.cli import main
from spider_sense.models import LoadedModel


class Refused(NamedTuple):
    """How a command ended."""

    code: object
    out: str
    err: str


Refuse = Callable[..., str]


@pytest.fixture
def refuse(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Run a command that must fail, and return its error."""

    def run(*arguments: object, loaded: LoadedModel = tiny_run.loaded) -> str:
        monkeypatch.setattr("spider_sense.models.load_model", lambda *_: loaded)
        monkeypatch.setattr("spider_sense.training.train.load_model", lambda *_: loaded)
        before = contents(tmp_path)
        ended = command(arguments, monkeypatch, capsys)
        assert contents(tmp_path) == before
        assert ended.code == 2, ended
        assert ended.err.startswith("error: "), ended
        assert ended.err.count("error:") == 1
        assert "Traceback" not in ended.err
        return ended.err

    return run


@pytest.fixture
def guard(tiny_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "guard"))


@pytest.fixture
def data(tiny_training: Any, tmp_path: Path) -> Path:
    return Path(tiny_training.write_rows(tmp_path / "data.jsonl", tiny_training.rows(8, seed=4)))


@pytest.fixture
def benign(tiny_training: Any, tmp_path: Path) -> Path:
    rows = [row for row in tiny_training.rows(8, seed=4) if row["label"] == "benign"]
    return Path(tiny_training.write_rows(tmp_path / "benign.jsonl", rows))


def command(
    arguments: Sequence[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    monkeypatch.setattr(sys, "argv", ["spider-sense", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    return Refused(ended.value.code, *capsys.readouterr())


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return all that lies in a folder, hidden names too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def scoring(verb: str, guard: Path, data: Path) -> tuple[object, ...]:
    return verb, "--guard", guard, "--model", "org/tiny", "--data", data


def train_yaml(tmp_path: Path, tiny_training: Any, **changes: Any) -> Path:
    settings = tiny_training.config(tmp_path).model_dump(mode="json") | changes
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "train.yaml"


@pytest.mark.parametrize("verb", ["eval", "calibrate"])
def test_missing_data_file(refuse: Refuse, guard: Path, tmp_path: Path, verb: str) -> None:
    error = refuse(*scoring(verb, guard, tmp_path / "none.jsonl"))
    assert f"cannot read {tmp_path / 'none.jsonl'}: No such file or directory" in error


@pytest.mark.parametrize("verb", ["eval", "calibrate", "inspect"])
def test_missing_guard(refuse: Refuse, benign: Path, tmp_path: Path, verb: str) -> None:
    nowhere = tmp_path / "nowhere"
    error = refuse(verb, nowhere) if verb == "inspect" else refuse(*scoring(verb, nowhere, benign))
    assert "nowhere/guard.json does not exist; name a folder that `spider-sense train` or" in error
    assert "`make bench-screening` wrote" in error


@pytest.mark.parametrize("verb", ["eval", "calibrate", "train"])
def test_row_without_text(refuse: Refuse, guard: Path, tiny_training: Any, tmp_path: Path, verb: str) -> None:
    rows = [{"text": "w1 w2", "label": "benign"}, {"label": "benign"}]
    bad = tiny_training.write_rows(tmp_path / "bad.jsonl", rows)
    if verb == "train":
        error = refuse("train", "--config", train_yaml(tmp_path, tiny_training, data=[str(bad)]))
    else:
        error = refuse(*scoring(verb, guard, bad))
    assert f"{bad}, line 2: the text is None; a row needs a 'text'" in error


def test_row_that_is_not_json(refuse: Refuse, guard: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "w1", "label": "benign"}\n{"text": \n')
    assert "bad.jsonl, line 2" in refuse(*scoring("eval", guard, tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_set_without_a_class(refuse: Refuse, guard: Path, benign: Path, tiny_training: Any, verb: str) -> None:
    if verb == "train":
        config = train_yaml(benign.parent, tiny_training, data=[str(benign)], output=str(guard))
        error = refuse("train", "--config", config)
    else:
        error = refuse(*scoring("eval", guard, benign))
    assert "no positive example: the labels are {'benign': 4}" in error


def test_traffic_that_is_not_benign(refuse: Refuse, guard: Path, data: Path) -> None:
    error = refuse(*scoring("calibrate", guard, data))
    assert "4 of 8 rows are labelled as what misuse is to find: {'harmful': 4}" in error


@pytest.mark.parametrize("verb", ["eval", "calibrate"])
def test_guard_of_another_model(
    refuse: Refuse, guard: Path, data: Path, benign: Path, tiny_model: Any, tiny_run: Any, verb: str
) -> None:
    other = LoadedModel(model=tiny_model("qwen2"), tokenizer=tiny_run.loaded.tokenizer, source="org/other")
    error = refuse(*scoring(verb, guard, data if verb == "eval" else benign), loaded=other)
    assert "made for org/tiny, not for org/other" in error
    assert "architecture is 'Qwen2ForCausalLM', expected 'LlamaForCausalLM'" in error


@pytest.mark.parametrize("verb", ["eval", "calibrate"])
def test_guard_of_another_tokenizer(
    refuse: Refuse, guard: Path, data: Path, benign: Path, tiny_run: Any, verb: str
) -> None:
    tokenizer = deepcopy(tiny_run.loaded.tokenizer)
    tokenizer.add_tokens(["w47"])
    other = LoadedModel(model=tiny_run.loaded.model, tokenizer=tokenizer, source="org/tiny")
    error = refuse(*scoring(verb, guard, data if verb == "eval" else benign), loaded=other)
    assert "made for org/tiny, not for org/tiny: tokenizer_digest is" in error


@pytest.mark.parametrize("verb", ["eval", "calibrate", "inspect"])
def test_truncated_weights(refuse: Refuse, guard: Path, benign: Path, verb: str) -> None:
    weights = guard / "probes.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    arguments = ("inspect", guard) if verb == "inspect" else scoring(verb, guard, benign)
    assert "the file is truncated or was exchanged" in refuse(*arguments)


def test_truncated_weights_with_the_right_digest(refuse: Refuse, guard: Path) -> None:
    from hashlib import sha256

    weights, manifest = guard / "probes.safetensors", json.loads((guard / "guard.json").read_text())
    weights.write_bytes(weights.read_bytes()[:-10])
    manifest["probes_digest"] = sha256(weights.read_bytes()).hexdigest()
    (guard / "guard.json").write_text(json.dumps(manifest))
    assert f"{weights} cannot be read" in refuse("inspect", guard)


def test_policy_with_an_unknown_action(refuse: Refuse, guard: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text('rules:\n  - {detector: "*", zone: breach, action: block}\n')
    error = refuse("generate", "--guard", guard, "--prompt", "w1", "--policy", policy)
    assert f"{policy}: rules.0.action: 'block' is not allowed" in error
    assert "'stop'" in error


def test_policy_with_a_patch_that_is_not_there(refuse: Refuse, guard: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text('rules:\n  - {detector: "*", zone: suspect, action: patch}\npatch: {folder: nowhere}\n')
    assert "nowhere" in refuse("generate", "--guard", guard, "--prompt", "w1", "--policy", policy)


def test_unknown_key_in_the_training_file(refuse: Refuse, tiny_training: Any, tmp_path: Path) -> None:
    error = refuse("train", "--config", train_yaml(tmp_path, tiny_training, familys=["logistic"]))
    assert "unknown key 'familys'; did you mean 'families'?" in error


def test_unset_variable(
    refuse: Refuse, guard: Path, tiny_training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPIDER_SENSE_DATA", raising=False)
    config = train_yaml(tmp_path, tiny_training, data=["$SPIDER_SENSE_DATA/x.jsonl"])
    expected = "'$SPIDER_SENSE_DATA/x.jsonl' names an environment variable that is not set"
    assert expected in refuse("train", "--config", config)
    assert expected in refuse(*scoring("calibrate", guard, Path("$SPIDER_SENSE_DATA/x.jsonl")))


def test_missing_training_file(refuse: Refuse, tmp_path: Path) -> None:
    assert "cannot read" in refuse("train", "--config", tmp_path / "none.yaml")


def test_output_that_is_no_guard(refuse: Refuse, tiny_training: Any, tmp_path: Path) -> None:
    config = train_yaml(tmp_path, tiny_training, output=str(tmp_path))
    assert "exists and is no guard, so it is not replaced" in refuse("train", "--config", config)


def test_work_that_cannot_be_written_is_told_before_the_model_is_loaded(
    refuse: Refuse, tiny_training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    monkeypatch.setattr("spider_sense.training.train.load_model", lambda name, *_: loads.append(name))
    (tmp_path / "file").write_text("mine")
    config = train_yaml(tmp_path, tiny_training, work=str(tmp_path / "file" / "work"))
    assert "file is a file; name another folder" in refuse("train", "--config", config)
    assert loads == []


def test_rates_out_of_order(refuse: Refuse, guard: Path, benign: Path) -> None:
    error = refuse(*scoring("calibrate", guard, benign), "--breach-fpr", "0.2")
    assert "breach_fpr=0.2 is above suspect_fpr=0.05" in error


def test_what_a_server_cannot_be_started_with(
    refuse: Refuse, guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    error = refuse("serve", guard, "--guard", guard)
    assert "vLLM is not installed" in error
    assert "pip install 'vllm==0.32.*'" in error
    monkeypatch.undo()
    monkeypatch.setattr("spider_sense.serving.launch.check_installed", lambda: None)
    assert "nowhere/guard.json does not exist" in refuse("serve", guard, "--guard", tmp_path / "nowhere")
    policy = tmp_path / "policy.yaml"
    policy.write_text('steer: {vector: calm, strength: 1}\nrules:\n  - {detector: "*", zone: breach, action: steer}\n')
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("a server was started"))
    arguments = ("serve", guard, "--guard", guard, "--policy", policy)
    said = refuse(*arguments)
    assert "rules.0.action: the vLLM engine cannot 'steer'; it can: observe, flag, throttle, omit_reasoning," in said
    assert "no such folder: /none" in refuse("serve", "/none", "--guard", guard)
    assert "name the model first" in refuse("serve", "--port", "80", guard, "--guard", guard)
    assert "as one JSON object" in refuse("serve", guard, "--guard", guard, "--additional_config.a", "1")


def test_sign_needs_one_key(refuse: Refuse, guard: Path) -> None:
    assert "one of them" in refuse("sign", guard)
    assert "one of them" in refuse("sign", guard, "--key", "a", "--generate-key", "b")
    assert "there is nothing to sign" in refuse("sign", "--key", "a")


def test_missing_package_is_named_with_its_extra(refuse: Refuse, guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    monkeypatch.delitem(sys.modules, "model_signing.signing", raising=False)
    assert "pip install '.[sign]'" in refuse("sign", guard, "--key", guard.parent / "k.pem")


def test_unknown_option(guard: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended = command(("inspect", guard, "--colour"), monkeypatch, capsys)
    assert ended.code == 2
    assert "--colour" in ended.err


def test_what_a_server_of_transformers_cannot_be_started_with(
    refuse: Refuse, guard: Path, tiny_loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed; the extra transformers-serve has it")
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)
    monkeypatch.setattr("uvicorn.Server.run", lambda _: pytest.fail("a port was opened"))
    other = tmp_path / "other"
    with torch.no_grad():
        tiny_loaded.model.get_input_embeddings().weight.mul_(2)
    for part in (tiny_loaded.model, tiny_loaded.tokenizer):
        part.save_pretrained(other)
    serve = ("serve", other, "--engine", "transformers", "--guard", guard)
    assert "made for org/tiny, not for" in refuse(*serve)
    assert "weight_digest is" in refuse(*serve, "--continuous-batching")
    assert "'transformer'; did you mean 'transformers'" in refuse("serve", other, "--engine", "transformer", *serve[4:])
    assert "exempt_principals: transformers' server cannot" in refuse(*serve, "--exempt-principals", "me")
    assert "--non-blocking: the server would run on without its guard" in refuse(*serve, "--non-blocking")
    assert "--additional-config is an option of vLLM's" in refuse(*serve, "--additional-config", "{}")
    policy = tmp_path / "policy.yaml"
    policy.write_text('rules:\n  - {detector: "*", zone: breach, action: throttle}\n')
    assert "the transformers engine cannot 'throttle'" in refuse(*serve, "--policy", policy)
    monkeypatch.setenv("SPIDER_SENSE_ENABLED", "0")
    assert "SPIDER_SENSE_ENABLED=0 switches the guard off" in refuse(*serve)
    monkeypatch.undo()
    monkeypatch.setattr("transformers.__version__", "5.20.1")
    assert "of transformers 5.20.1 was not tested with a guard, only that of 5.19.x" in refuse(*serve)
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install '.[transformers-serve]'" in refuse(*serve).replace("\n", "")

"""The command and the environment of a guarded server."""

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from spider_sense.errors import ConfigError
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.serving import launch
from spider_sense.serving.launch import serve_command, serve_environment
from spider_sense.serving.settings import ServingSettings

SETTINGS = ServingSettings(guard=Path("g"), scores=True)


@pytest.fixture
def guard(guards: Any, tiny_loaded: LoadedModel) -> Guard:
    made: Guard = guards.guard(tiny_loaded, (guards.probe("misuse", "mean", "resid.0"),))
    return made


def command(guard: Guard, *given: str, additional: str | None = None) -> list[str]:
    return serve_command("smollm2", Path("/models/smollm2"), guard, SETTINGS, given, additional)


def option(command: list[str], name: str) -> str:
    assert command.count(name) == 1
    return command[command.index(name) + 1]


def test_the_options_of_vllm_pass_and_what_is_not_said_follows_the_guard(guard: Guard) -> None:
    made = command(guard, "--port", "80", "-tp", "2")
    assert made[:8] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "/models/smollm2", *made[5:8]]
    assert made[5:9] == ["--port", "80", "-tp", "2"]
    assert (option(made, "--dtype"), option(made, "--served-model-name")) == ("float32", "smollm2")
    assert json.loads(option(made, "--additional-config")) == {"spider_sense": {"guard": "g", "scores": True}}


def test_what_is_said_counts(guard: Guard, tmp_path: Path) -> None:
    made = command(guard, "--dtype=bfloat16", "--served_model_name", "mine")
    assert "--dtype" not in made
    assert "--served-model-name" not in made
    (tmp_path / "vllm.yaml").write_text("dtype: bfloat16\nport: 80\n")
    made = command(guard, "--config", str(tmp_path / "vllm.yaml"))
    assert "--dtype" not in made
    assert option(made, "--served-model-name") == "smollm2"


def test_another_additional_configuration_is_kept(guard: Guard) -> None:
    made = command(guard, additional='{"other": {"a": 1}}')
    told = json.loads(option(made, "--additional-config"))
    assert told == {"other": {"a": 1}, "spider_sense": {"guard": "g", "scores": True}}


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        ('{"spider_sense": {}}', "has the key 'spider_sense' already; leave it out"),
        ("[1]", "is not an object"),
        ("{", "is not JSON"),
    ],
)
def test_a_conflict_is_an_error(guard: Guard, additional: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command(guard, additional=additional)


def test_a_configuration_in_another_form_would_replace_the_guard(guard: Guard, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="as one JSON object"):
        command(guard, "--additional_config.other.a", "1")
    (tmp_path / "vllm.yaml").write_text("additional-config: '{}'\n")
    with pytest.raises(ConfigError, match="as one JSON object"):
        command(guard, f"--config={tmp_path}/vllm.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml"):
        command(guard, "--config", str(tmp_path / "none.yaml"))


def test_the_plugin_is_loaded_beside_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve_environment({"VLLM_PLUGINS": "mine,"})["VLLM_PLUGINS"] == "mine,spider_sense"
    assert serve_environment({"VLLM_PLUGINS": "spider_sense,mine"})["VLLM_PLUGINS"] == "spider_sense,mine"
    entries = {"vllm.general_plugins": ["spider_sense", "lora"], "vllm.platform_plugins": ["npu"]}
    monkeypatch.setattr(
        launch, "entry_points", lambda group: [EntryPoint(name, "a:b", group) for name in entries.get(group, ())]
    )
    # Naming one alone would take away those that vLLM loads unasked.
    assert serve_environment({"A": "b"}) == {"A": "b", "VLLM_PLUGINS": "spider_sense,lora,npu"}


def test_a_guard_that_is_switched_off_is_not_served() -> None:
    with pytest.raises(ConfigError, match="SPIDER_SENSE_ENABLED=0 switches the guard off"):
        serve_environment({"SPIDER_SENSE_ENABLED": "0"})

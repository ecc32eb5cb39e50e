"""Settings and their YAML."""

import math
from pathlib import Path
from typing import Literal, Self

import pytest
from pydantic import ValidationError, model_validator

from spider_sense.config import Settings, load_yaml, parse
from spider_sense.errors import ConfigError


class Optimiser(Settings):
    name: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 0.1


class Extra(Settings):
    folder: Path


class Job(Settings):
    steps: int
    labels: tuple[str, ...] = ()
    optimisers: tuple[Optimiser, ...] = ()
    extra: Extra | None = None
    verbose: bool = False

    @model_validator(mode="after")
    def _steps_are_positive(self) -> Self:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        return self


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_fills_the_class(tmp_path: Path) -> None:
    text = "steps: 3\nlabels: [a, b]\noptimisers:\n  - {name: sgd, learning_rate: 1}\nextra: {folder: out}\n"
    job = load_yaml(write(tmp_path, text), Job)
    assert job == Job(
        steps=3,
        labels=("a", "b"),
        optimisers=(Optimiser(name="sgd", learning_rate=1.0),),
        extra=Extra(folder=Path("out")),
    )


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("-2E+4", -2e4), ("3.5e2", 350.0), (".inf", math.inf)])
def test_exponents_without_a_dot_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert load_yaml(write(tmp_path, f"learning_rate: {text}"), Optimiser).learning_rate == value


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Job(steps=1).steps = 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.yaml: No such file"):
        load_yaml(tmp_path / "absent.yaml", Job)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nlabels: [a, b\nverbose: true\n", "job.yaml, line 3: not valid YAML"),
        ("steps: 3\ndetector: *\n", "job.yaml, line 2: not valid YAML"),
        ("steps: 3\nverbose: true\nsteps: 4\n", "job.yaml, line 3: not valid YAML: the key 'steps' is written twice"),
        ("steps: 2026-13-01\n", "job.yaml: not valid YAML: month must be"),
        ("steps: \x00\n", "job.yaml: not valid YAML"),
        ("", "job.yaml: holds None, not keys and values; known keys: steps, labels"),
        ("- steps\n", r"job.yaml: holds \['steps'\], not keys and values"),
        ("extra: &loop [*loop]\n", "job.yaml: cannot be read as plain keys and values"),
    ],
)
def test_bad_yaml_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_yaml(write(tmp_path, text), Job)


def test_bytes_that_are_not_utf8_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"steps: \xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(path, Job)


def test_the_same_key_in_two_mappings_is_allowed(tmp_path: Path) -> None:
    text = "steps: 1\noptimisers: [{name: sgd}, {name: adam}]\n"
    assert [optimiser.name for optimiser in load_yaml(write(tmp_path, text), Job).optimisers] == ["sgd", "adam"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"steps": 1, "lables": []}, "origin: unknown key 'lables'; did you mean 'labels'? Known: extra, labels, "),
        (
            {"steps": 1, "optimisers": [{}, {"lerning_rate": 1}]},
            "origin: unknown key 'optimisers.1.lerning_rate'; did you mean 'learning_rate'? Known: learning_rate, name",
        ),
        (
            {"steps": 1, "extra": {"folder": "out", "foldr": "in"}},
            "origin: unknown key 'extra.foldr'; did you mean 'folder'? Known: folder",
        ),
        ({"labels": []}, "origin: the key 'steps' is missing"),
        ({"steps": 1, "extra": {}}, "origin: the key 'extra.folder' is missing"),
        (
            {"steps": 1, "optimisers": [{"name": "adams"}]},
            "origin: optimisers.0.name: 'adams' is not allowed; input should be 'adam' or 'sgd'",
        ),
        ({"steps": "3"}, "origin: steps: '3' is not allowed; input should be a valid integer"),
        ({"steps": True}, "origin: steps: True is not allowed; input should be a valid integer"),
        ({"steps": 1, "verbose": 1}, "origin: verbose: 1 is not allowed; input should be a valid boolean"),
        ({"steps": 1, "extra": "out"}, "origin: extra: 'out' is not allowed; input should be an object"),
        ({"steps": 0}, "origin: steps is 0; it must be at least 1"),
    ],
)
def test_a_fault_is_named_with_its_path(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(mapping, Job, origin="origin")
    assert message in str(caught.value)


def test_every_fault_has_its_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"steps": "x", "a": 1, "verbose": 0}, Job, origin="origin")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("origin: ") for line in lines)


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"steps": "x" * 1000}, Job, origin="origin")
    assert len(str(caught.value)) < 200

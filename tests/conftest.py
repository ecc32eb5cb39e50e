"""What every test sees: the environment, and tiny random models."""

import os

# Triton reads this when it is first imported, and torch imports it.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spider_sense.extraction.tiers import TieredDetector
    from spider_sense.models import LoadedModel


# A machine that is busy with other work is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def _load(name: str) -> ModuleType:
    # pytest's importlib mode puts no folder on the path, so a test cannot import its neighbour by name.
    spec = importlib.util.spec_from_file_location(f"tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_tiny: Any = _load("tiny_models")


@pytest.fixture(params=_tiny.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Run the test once for each architecture in the table of sites."""
    return str(request.param)


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Let new files be for everybody, unless who makes them says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def tiny_model() -> "Callable[[str], PreTrainedModel]":
    """Return the builder of tiny random models: ``tiny_model("llama")``."""
    builder: Callable[[str], PreTrainedModel] = _tiny.tiny_model
    return builder


@pytest.fixture
def tiny_loaded() -> "LoadedModel":
    """A tiny llama with a tokenizer that has a chat template."""
    from spider_sense.models import LoadedModel

    return LoadedModel(model=_tiny.tiny_model("llama"), tokenizer=_tiny.tiny_tokenizer(), source="org/tiny")


@pytest.fixture(scope="session")
def tiny_streams() -> Any:
    """Return the builders of made-up principals' streams, the module ``tiny_streams``."""
    return _load("tiny_streams")


@pytest.fixture(scope="session")
def uncalibrated(tiny_streams: Any) -> "TieredDetector":
    """A detector of extraction that is fitted on made-up principals, without thresholds."""
    fitted: TieredDetector = tiny_streams.fitted()
    return fitted


@pytest.fixture(scope="session")
def detector(tiny_streams: Any, uncalibrated: "TieredDetector") -> "TieredDetector":
    """The same with thresholds at 1% for every tier, on 300 other honest principals."""
    calibrated: TieredDetector = tiny_streams.calibrated(uncalibrated)
    return calibrated


@pytest.fixture
def guards() -> Any:
    """Return the builders of guards for tiny models, the module ``tiny_guards``."""
    return _load("tiny_guards")


@pytest.fixture(scope="session")
def chat_formats() -> Any:
    """Return the builder of tokenizers in four families' chat formats, the module ``chat_formats``."""
    return _load("chat_formats")


@pytest.fixture(scope="session")
def agent_loaded(chat_formats: Any) -> "LoadedModel":
    """A tiny llama with a tokenizer of bytes and SmolLM2's format, tool calls in it."""
    from spider_sense.models import LoadedModel

    tokenizer = chat_formats.format_tokenizer("smollm2")
    return LoadedModel(model=chat_formats.format_model(tokenizer), tokenizer=tokenizer, source="org/tiny")


@pytest.fixture(scope="session")
def tiny_patches() -> Any:
    """Return the builders of random patches for tiny models, the module ``tiny_patches``."""
    return _load("tiny_patches")


@pytest.fixture(scope="session")
def tiny_neurons() -> Any:
    """Return the builders of planted models, prompts and sets of neurons, the module ``tiny_neurons``."""
    return _load("tiny_neurons")


@pytest.fixture(scope="session")
def tiny_training() -> Any:
    """Return the builders of tiny training runs, the module ``tiny_training``."""
    return _load("tiny_training")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_training: Any) -> Any:
    """Train a guard for a tiny model, once; a test that changes the guard copies its folder."""
    from spider_sense.models import LoadedModel

    loaded = LoadedModel(model=_tiny.tiny_model("llama"), tokenizer=_tiny.tiny_tokenizer(), source="org/tiny")
    return tiny_training.run(tmp_path_factory.mktemp("tiny_run"), loaded)

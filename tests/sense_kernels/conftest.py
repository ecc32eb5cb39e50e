"""What the tests of the kernels share: lanes of every kind with an oracle, and requests cut into steps."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """Let every test draw the same numbers, in whatever order tests run."""
    torch.manual_seed(0)


def _load(name: str) -> ModuleType:
    # pytest's importlib mode puts no folder on the path, so a test cannot import its neighbour by name.
    spec = importlib.util.spec_from_file_location(f"tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracle() -> Any:
    """Return the module ``fold_oracle``: a bank of lanes and the value of its heads, straight from the definitions."""
    return _load("fold_oracle")


@pytest.fixture(scope="session")
def traffic() -> Any:
    """Return the module ``fold_traffic``: requests, their chunks, and the steps that feed them."""
    return _load("fold_traffic")

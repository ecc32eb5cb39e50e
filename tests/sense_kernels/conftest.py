"""What the tests of the kernels share: lanes of every kind with an oracle, and requests cut into steps."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """Let every test draw the same numbers, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def exact_dots() -> Iterator[None]:
    """Let the interpreter multiply tiles token by token, as a GPU does: with some processors' BLAS a row of a product
    depends on its place among the others, which is what the kernels must not do."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = np.zeros_like(d.data)
        with np.errstate(over="ignore", invalid="ignore"):
            for k in range(a.data.shape[-1]):
                total += a.data[..., k, None].astype(total.dtype) * b.data[..., k, None, :].astype(total.dtype)
            return TensorHandle(total + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield


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

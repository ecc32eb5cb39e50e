"""The layout: what is public, what importing costs, and that nothing shadows Hugging Face's ``kernels``."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import spider_sense

ROOT = Path(__file__).parents[1]


def test_public_names_are_sorted_and_there() -> None:
    assert list(spider_sense.__all__) == sorted(spider_sense.__all__)
    for name in spider_sense.__all__:
        assert getattr(spider_sense, name).__name__ == name


def heavy_after(code: str) -> str:
    """Run code in a process of its own and return which slow packages it imported."""
    heavy = ("torch", "transformers", "sklearn", "scipy", "numpy")
    told = f"import atexit, sys; atexit.register(lambda: sys.stderr.write(' '.join(sys.modules.keys() & {heavy})))"
    return subprocess.run([sys.executable, "-c", f"{told}; {code}"], capture_output=True, text=True, check=True).stderr


def test_importing_the_package_is_light() -> None:
    assert heavy_after("import spider_sense") == ""


@pytest.mark.parametrize("package", ["spider_sense", "nest"])
def test_the_command_line_is_light(package: str) -> None:
    assert heavy_after(f"from {package}.cli import main; sys.argv[1:] = ['--help']; main()") == ""


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_no_file_is_longer_than_500_lines() -> None:
    long = [
        str(path)
        for folder in ("spider_sense", "nest", "kernels", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if len(path.read_text().splitlines()) > 500
    ]
    assert not long

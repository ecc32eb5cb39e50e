"""The layout: what is public, what importing costs, and that nothing shadows Hugging Face's ``kernels``."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import spider_sense

ROOT = Path(__file__).parents[1]


def test_public_names_are_sorted_and_there() -> None:
    assert list(spider_sense.__all__) == sorted(spider_sense.__all__)
    for name in spider_sense.__all__:
        assert getattr(spider_sense, name).__name__ == name


def test_importing_the_package_is_light() -> None:
    code = "import sys, spider_sense; print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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

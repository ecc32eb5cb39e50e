"""The configurations that ship are valid, and every scene that the last line needs is in them."""

from pathlib import Path

import pytest

from spider_sense.config import load_yaml
from spider_sense.extraction.bench.config import BenchConfig, Cell

CONFIGS = Path(__file__).parents[4] / "configs"


@pytest.mark.parametrize("name", ["bench-extraction.yaml", "bench-extraction-quick.yaml"])
def test_shipped_configurations(name: str) -> None:
    config = load_yaml(CONFIGS / name, BenchConfig)
    for start, share in (("first", 1.0), ("pivot", 1.0), ("pivot", 0.5)):
        assert any(cell.start == start and cell.share == share for cell in config.cells)
    assert config.organisations.calibrate >= 1 / config.alpha
    assert config.principals.calibrate >= 299
    assert len({cell.name for cell in config.cells}) == len(config.cells)


def test_a_cell_says_what_it_is() -> None:
    assert Cell(share=0.25, cover="app", start="drip").name == "drip 0.25 app"

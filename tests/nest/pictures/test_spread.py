"""The picture of neurons over layers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nest.neurons import ModuleRecord, NeuronSet
from nest.pictures import spread
from spider_sense.models import LoadedModel
from spider_sense.types import Site


@pytest.fixture
def neurons(tiny_loaded: LoadedModel, tiny_neurons: Any) -> NeuronSet:
    profiles = {Site(0, "gate"): torch.randn(5, 8), Site(1, "up"): torch.randn(2, 8)}
    made: NeuronSet = tiny_neurons.neuron_set(tiny_loaded, profiles)
    silent = ModuleRecord(rows=48, selected=0, held_out_auroc=0.5)
    modules = {**made.manifest.modules, "up.0": silent, "gate.1": silent}
    return NeuronSet(made.manifest.model_copy(update={"modules": modules}), made.sites)


def test_a_bar_is_as_high_as_rows_were_selected(neurons: NeuronSet, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(spread, "write_png", lambda axes, path: drawn.append(axes))
    spread.draw_spread(neurons, Path("unused.png"))
    bars = {
        (round(bar.get_x() + bar.get_width() / 2), series.get_label()): bar.get_height()
        for series in drawn[0].containers
        for bar in series
    }
    assert bars == {(0, "gate"): 5, (1, "gate"): 0, (0, "up"): 0, (1, "up"): 2}
    assert drawn[0].get_title() == "7 of 192 rows selected (3.65%)"
    assert [text.get_text() for text in drawn[0].figure.legends[0].get_texts()] == ["gate", "up"]


def test_experts_of_a_layer_add_up(
    tiny_loaded: LoadedModel, tiny_neurons: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = {Site(0, "gate", 1): torch.randn(5, 8), Site(0, "gate", 3): torch.randn(2, 8)}
    drawn: list[Any] = []
    monkeypatch.setattr(spread, "write_png", lambda axes, path: drawn.append(axes))
    spread.draw_spread(tiny_neurons.neuron_set(tiny_loaded, profiles), Path("unused.png"))
    assert [bar.get_height() for series in drawn[0].containers for bar in series] == [7]


def test_it_is_written_as_a_png(neurons: NeuronSet, tmp_path: Path) -> None:
    spread.draw_spread(neurons, tmp_path / "spread.png")
    assert (tmp_path / "spread.png").read_bytes().startswith(b"\x89PNG")

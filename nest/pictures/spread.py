"""How found neurons are spread over the layers."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nest.neurons import ModuleRecord, NeuronSet
from nest.pictures.canvas import COLOURS, axes, legend, write_png
from spider_sense.types import Place, Site

__all__ = ["draw_spread"]

WIDTH = 0.8
"""Of all bars of a layer, in layers."""


def draw_spread(neurons: NeuronSet, path: Path) -> None:
    """Draw the selected rows of each layer, a bar for gate and one for up, and write the PNG."""
    modules = {Site.parse(name): module for name, module in neurons.manifest.modules.items()}
    places = sorted({site.place for site in modules})
    picture = axes(
        f"{neurons.count} of {neurons.total_rows} rows selected ({neurons.share:.2%})", "layer", "rows selected"
    )
    for index, place in enumerate(places):
        _bars(picture, modules, place, index, len(places))
    # Outside, because bars may reach any corner.
    legend(picture)
    picture.xaxis.get_major_locator().set_params(integer=True)
    picture.margins(x=0.01)
    write_png(picture, path)


def _bars(picture: Any, modules: Mapping[Site, ModuleRecord], place: Place, index: int, places: int) -> None:
    counts = Counter[int]()
    for site, module in modules.items():
        if site.place == place:
            # Experts of a layer add up.
            counts[site.layer] += module.selected
    width = WIDTH / places
    offset = (index - (places - 1) / 2) * width
    picture.bar([layer + offset for layer in counts], list(counts.values()), width, label=place, color=COLOURS[index])

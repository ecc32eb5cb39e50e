"""Tables of neurons."""

from collections.abc import Iterable, Mapping
from statistics import median

from rich import box
from rich.table import Table
from rich.text import Text

from nest.neurons import ModuleRecord, NeuronSet
from spider_sense.types import Place, Site

__all__ = ["found_table", "grouped_table"]


def found_table(neurons: NeuronSet) -> Table:
    """Return how many rows of each layer's projections were selected, and how well each projection separates.

    A mixture's experts are summed up, with the median of their areas and how many of them were looked at.
    """
    modules = {Site.parse(name): module for name, module in neurons.manifest.modules.items()}
    left_out = {Site.parse(name) for name in neurons.manifest.left_out}
    places = sorted({site.place for site in modules})
    mixture = any(site.expert is not None for site in modules)
    area = "median held-out AUROC" if mixture else "held-out AUROC"
    table = Table(title=Text(_title(neurons)), box=box.SIMPLE_HEAD)
    for name in ("layer", *(f"{place}{column}" for place in places for column in ("", ": of", f": {area}"))):
        table.add_column(name, justify="right", no_wrap=True)
    if mixture:
        table.add_column("experts", justify="right", no_wrap=True)
    for layer in sorted({site.layer for site in {*modules, *left_out}}):
        cells = [cell for place in places for cell in _cells(modules, layer, place)]
        table.add_row(str(layer), *cells, *([_experts(modules, left_out, layer)] if mixture else []))
    return table


def grouped_table(neurons: NeuronSet) -> Table:
    """Return how many groups the projections have, and how many numbers tuning them trains."""
    count = neurons.clusters * neurons.manifest.base.width
    title = f"{neurons.count} rows in {neurons.clusters} groups: {count} numbers to tune"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("groups", "projections", "rows", "median silhouette"):
        table.add_column(name, justify="right")
    silhouettes = (neurons.manifest.grouping or {}).get("silhouette", {})
    for k in sorted({found.clusters for found in neurons.sites.values()}):
        sites = [site for site, found in neurons.sites.items() if found.clusters == k]
        values = [value for site in sites if (value := silhouettes.get(str(site))) is not None]
        rows = sum(len(neurons.sites[site].neuron_R) for site in sites)
        table.add_row(str(k), str(len(sites)), str(rows), f"{median(values):.3f}" if values else "-")
    return table


def _title(neurons: NeuronSet) -> str:
    prompts = neurons.manifest.prompts
    recipe = neurons.manifest.recipe
    return (
        f"{neurons.count} of {neurons.total_rows} rows ({neurons.share:.2%}) with z > {recipe['z']:g} by "
        f"{recipe['recipe']}, {prompts.harmful} harmful against {prompts.benign} benign prompts"
    )


def _cells(modules: Mapping[Site, ModuleRecord], layer: int, place: Place) -> tuple[str, str, str]:
    own = [module for site, module in modules.items() if (site.layer, site.place) == (layer, place)]
    areas = [module.held_out_auroc for module in own if module.held_out_auroc is not None]
    area = f"{median(areas):.3f}" if areas else "-"
    return str(sum(module.selected for module in own)), str(sum(module.rows for module in own)), area


def _experts(modules: Iterable[Site], left_out: Iterable[Site], layer: int) -> str:
    used = {site.expert for site in modules if site.layer == layer and site.expert is not None}
    unused = {site.expert for site in left_out if site.layer == layer}
    return f"{len(used)} of {len(used | unused)}" if used | unused else "-"

"""Tables of neurons."""

from statistics import median

from rich import box
from rich.table import Table
from rich.text import Text

from nest.neurons import NeuronSet
from spider_sense.types import Site

__all__ = ["found_table", "grouped_table"]


def found_table(neurons: NeuronSet) -> Table:
    """Return how many rows of each layer's projections were selected, and how well each projection separates."""
    modules = {Site.parse(name): module for name, module in neurons.manifest.modules.items()}
    places = sorted({site.place for site in modules})
    table = Table(title=Text(_title(neurons)), box=box.SIMPLE_HEAD)
    for name in ("layer", *(f"{place}{column}" for place in places for column in ("", ": of", ": held-out AUROC"))):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in sorted({site.layer for site in modules}):
        cells = [_cells(neurons, Site(layer, place)) for place in places]
        table.add_row(str(layer), *(cell for part in cells for cell in part))
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


def _cells(neurons: NeuronSet, site: Site) -> tuple[str, str, str]:
    module = neurons.manifest.modules[str(site)]
    area = "-" if module.held_out_auroc is None else f"{module.held_out_auroc:.3f}"
    return str(module.selected), str(module.rows), area

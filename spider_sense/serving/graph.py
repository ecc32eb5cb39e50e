"""What of a guard is compiled into a model's graph: a graph that was compiled with anything else is not its own."""

from spider_sense.extraction.online import heads_of, read_artifact
from spider_sense.guard import Guard
from spider_sense.scoring import SiteMap
from spider_sense.serving.patch_seams import find_patch
from spider_sense.serving.settings import ServingSettings
from spider_sense.types import Site

__all__ = ["OP_VERSION", "graph_of"]

OP_VERSION = 3
"""Raised whenever what is compiled into the model's graph changes."""


def graph_of(guard: Guard, settings: ServingSettings) -> str:
    """Return what of a guard, of whoever watches for extraction and of the policy's patch the model's graph holds."""
    heads = () if settings.extraction is None else heads_of(read_artifact(settings.load_extraction()))
    probes = [f"{probe.name}:{'+'.join(map(_taps, probe.maps.items()))}" for probe in (*guard.probes, *heads)]
    return f"{OP_VERSION}/{'/'.join(probes)}{_patch_of(settings)}"


def _taps(item: tuple[Site, SiteMap]) -> str:
    """Return a site, and how many columns its products write: they decide which op is compiled, and what it writes."""
    site, one = item
    weights = [one.weight] if one.mlp_weight is None else [one.weight, one.mlp_weight]
    return "*".join([str(site), *(str(weight.shape[1]) for weight in weights)])


def _patch_of(settings: ServingSettings) -> str:
    """Return what of the patch is compiled. Its digest stands for its rows, which decide what each rank compiles."""
    found = find_patch(settings)
    return "" if found is None else f"/patch:{found[0].digest}*{found[1]}"

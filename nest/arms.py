"""The arms of the comparison: what is tuned, from the same lessons and with the same budget of steps."""

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from nest.controls import one_cluster, random_clusters, random_rows, untied
from nest.delta import lora_deltas, shared_deltas
from nest.full import Change, FullChange
from nest.neurons import NeuronSet
from spider_sense.errors import ConfigError
from spider_sense.layouts import layout_of
from spider_sense.sites import resolve
from spider_sense.types import Site

__all__ = ["ARMS", "build", "check"]

Builder = Callable[[nn.Module, NeuronSet, int], Change]

_QV = ("q_proj", "v_proj")
_QV_RANK = 8


def build(arm: str, model: nn.Module, neurons: NeuronSet, seed: int) -> Change:
    """Return what an arm trains, untrained.

    Args:
        arm: a key of ``ARMS``.
        model: the base model.
        neurons: found and grouped; the controls take their counts from it.
        seed: of the arm's own draw: random rows, random clusters, LoRA's start.
    """
    return ARMS[arm](model, neurons, seed)


def check(arms: Collection[str], model: nn.Module, neurons: NeuronSet) -> None:
    """Check, before anything is trained, that a model has what some arms train.

    Raises:
        ConfigError: naming the arm to leave out.
    """
    if "lora_matched" in arms:
        _projections(neurons)
    if "lora_qv" in arms:
        _queries_and_values(model)


def _lora_matched(model: nn.Module, neurons: NeuronSet, seed: int) -> Change:
    """Return LoRA of rank 1 on as many gate and up projections, evenly spread, as NeST's parameters pay for."""
    budget, sites = shared_deltas(model, neurons).count(), _projections(neurons)
    modules = {str(site): resolve(model, site).module for site in sites}
    costs = [sum(module.weight.shape) for module in modules.values()]  # type: ignore[arg-type]
    affordable = min(len(sites), max(1, budget * len(costs) // sum(costs)))
    chosen = _spread(sites, affordable)
    return lora_deltas({str(site): modules[str(site)] for site in chosen}, 1, seed)


def _projections(neurons: NeuronSet) -> list[Site]:
    """Return every projection that was looked at.

    Raises:
        ConfigError: if one lies inside an expert.
    """
    sites = sorted(Site.parse(name) for name in neurons.manifest.modules)
    inside = next((site for site in sites if site.expert is not None), None)
    if inside is not None:
        raise ConfigError(
            f"lora_matched has no adapter for {inside}, a projection inside an expert; leave out arm 'lora_matched'"
        )
    return sites


def _spread(sites: Sequence[Site], count: int) -> list[Site]:
    """Return some sites: layers evenly, and gates and ups in turn."""
    places, layers = sorted({site.place for site in sites}), sorted({site.layer for site in sites})
    chosen: list[Site] = []
    for turn in range(len(places)):
        wanted = min(count - len(chosen), len(layers))
        for index in range(wanted):
            at = index * len(layers) // wanted
            at += (at + index) % 2 if 2 * wanted <= len(layers) else 0
            # In the second turn a layer gets what it did not get in the first.
            place = places[(index if turn == 0 else at + turn) % len(places)]
            chosen.append(Site(layers[at], place))
    return sorted(site for site in chosen if site in sites)


def _lora_qv(model: nn.Module, neurons: NeuronSet, seed: int) -> Change:
    return lora_deltas(_queries_and_values(model), _QV_RANK, seed)


def _queries_and_values(model: nn.Module) -> dict[str, nn.Module]:
    """Return the projections of the text model by name.

    Raises:
        ConfigError: if there are none.
    """
    blocks = f"{layout_of(model).blocks}."
    modules = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(blocks) and name.rpartition(".")[2] in _QV
    }
    if not modules:
        raise ConfigError(
            f"{type(model).__name__} has no projections named {' or '.join(_QV)}; leave out arm 'lora_qv'"
        )
    return modules


ARMS: Mapping[str, Builder] = {
    "nest": lambda model, neurons, seed: shared_deltas(model, neurons),
    "random_rows": lambda model, neurons, seed: shared_deltas(model, random_rows(neurons, seed)),
    "random_clusters": lambda model, neurons, seed: shared_deltas(model, random_clusters(neurons, seed)),
    "untied": lambda model, neurons, seed: shared_deltas(model, untied(neurons)),
    "one_cluster": lambda model, neurons, seed: shared_deltas(model, one_cluster(neurons)),
    "lora_matched": _lora_matched,
    "lora_qv": _lora_qv,
    "full": lambda model, neurons, seed: FullChange(model),
}
"""Every arm that trains something; the arm ``base`` does not."""

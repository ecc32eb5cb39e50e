"""The families of probes, each a function from labelled activations to a probe that streams.

With several sites the logit columns are linear in the concatenation of the layers: one map per site, whose columns are
summed, the bias on the first. Standardisation is folded into the maps.

multimax is trained under the softmax and read by the hard maximum (arXiv 2601.11516): on SmolLM2-135M that separated
better than training under the maximum, on each of three seeds. swim and topk are trained on window means and read by a
moving average, as published.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.errors import ConfigError, nearest
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.training import gradient, linear, losses, pooling
from spider_sense.training.features import TrainingSet
from spider_sense.training.gradient import Design
from spider_sense.training.options import FitOptions
from spider_sense.types import Site

__all__ = ["DESIGNS", "FAMILIES", "fit"]

ROLLING_WINDOW = 10
"""Tokens in a window of rolling_attention (arXiv 2601.11516)."""

SOLVED: dict[str, Callable[[TrainingSet], tuple[npt.NDArray[np.float64], float]]] = {
    "logistic": linear.logistic,
    "mass_mean": linear.mass_mean,
}


def _attention(options: FitOptions) -> Design:
    return Design(aggregator=Aggregator(kind="attention", parts=options.parts), loss=losses.pooled(pooling.attention))


def _mlp(options: FitOptions) -> Design:
    return Design(aggregator=Aggregator(kind="mean"), loss=losses.pooled(pooling.mean), hidden=options.hidden)


def _multimax(options: FitOptions) -> Design:
    return Design(aggregator=Aggregator(kind="multimax", parts=options.parts), loss=losses.pooled(pooling.multimax))


def _rolling_attention(options: FitOptions) -> Design:
    aggregator = Aggregator(kind="rolling_attention", parts=options.parts, window=ROLLING_WINDOW)
    return Design(aggregator=aggregator, loss=losses.pooled(pooling.rolling_attention(ROLLING_WINDOW)))


def _swim(options: FitOptions) -> Design:
    return Design(aggregator=Aggregator(kind="ema_max", alpha=options.alpha), loss=losses.swim(options.window))


def _topk(options: FitOptions) -> Design:
    loss = losses.topk(options.window, options.top_k)
    return Design(aggregator=Aggregator(kind="ema_max", alpha=options.alpha), loss=loss)


DESIGNS: dict[str, Callable[[FitOptions], Design]] = {
    "attention": _attention,
    "mlp": _mlp,
    "multimax": _multimax,
    "rolling_attention": _rolling_attention,
    "swim": _swim,
    "topk": _topk,
}
"""The families that are fitted by gradient descent."""

FAMILIES: tuple[str, ...] = tuple(sorted((*SOLVED, *DESIGNS)))


def fit(
    family: str,
    data: ActivationSet,
    train: npt.NDArray[np.int64],
    labels: npt.NDArray[np.bool_],
    sites: tuple[Site, ...],
    name: str,
    options: FitOptions,
    weights: npt.NDArray[np.float64] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Probe:
    """Fit one probe.

    Args:
        family: one of ``FAMILIES``.
        data: the captured conversations, N of them. Families that are fitted by gradient descent read their responses
            too, the others their prompts.
        train: which conversations to fit on, indices into N.
        labels: [N], True for a positive.
        sites: what the probe reads; mlp reads one.
        name: the probe's name.
        options: see ``FitOptions``.
        weights: [N], weight of each conversation in the loss, or None for all alike.
        progress: is told the share that is done, from 0 to 1.

    Raises:
        ConfigError: for an unknown family, a site that was not captured, or mlp on several sites.
        DataError: if labels or weights do not fit, or a class is missing.
        MissingExtraError: for logistic without scikit-learn.
    """
    if family not in FAMILIES:
        raise ConfigError(f"unknown probe family {family!r}; {nearest(family, FAMILIES)}")
    if family == "mlp" and len(sites) != 1:
        raise ConfigError(f"mlp reads one site, got {len(sites)}: {', '.join(map(str, sites))}; choose one of them")
    rows = TrainingSet.of(data, train, labels, sites, weights)
    if family in SOLVED:
        weight_F, bias = SOLVED[family](rows)
        maps = _site_maps(sites, torch.from_numpy(weight_F).float()[:, None], torch.tensor([bias]).float())
        if progress is not None:
            progress(1.0)
        return Probe(name=name, family=family, aggregator=Aggregator(kind="mean"), maps=maps)
    design = DESIGNS[family](options)
    maps = _site_maps(sites, *gradient.train(design, rows, options, progress).folded())
    return Probe(name=name, family=family, aggregator=design.aggregator, maps=maps)


def _site_maps(
    sites: tuple[Site, ...], weight_FK: Tensor, bias_K: Tensor, second: Tensor | None = None, last: Tensor | None = None
) -> dict[Site, SiteMap]:
    parts = weight_FK.chunk(len(sites))
    biases = [bias_K, *(torch.zeros_like(bias_K) for _ in sites[1:])]
    return {
        site: SiteMap(part.contiguous(), bias, second, last)
        for site, part, bias in zip(sites, parts, biases, strict=True)
    }

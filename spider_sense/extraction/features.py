"""What a principal looks like after n requests, as a vector.

Of the activations it reads the probe for all campaigns and how much requests vary, not what they are about: the means of
sketches tell families of honest work apart, and the next family is another one.

Shape letters: N principals, S sketch, J directions, B bins, F features.
"""

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.counting import distinct
from spider_sense.extraction.layout import States
from spider_sense.extraction.profile import SCORING

__all__ = ["FEATURES", "GROUP_FEATURES", "LEADING", "mean_sketch", "member_vector", "vector"]

LEADING = 24
"""Coordinates of the mean sketch that groups are compared by."""
TOP = 0.1
"""Share of the requests whose probe logits ``top decile`` averages: cover traffic does not dilute it."""

_SUMS = ("sketch", "probe", "probe_squared", "probe_positive", "probe_high")
GROUP_FEATURES = ("probe mean", "probe sd", "probe positive", "probe high")
"""Names of the columns of ``member_vector``."""
FEATURES = (
    *(*GROUP_FEATURES, "probe top decile"),
    *("sketch concentration", "share of cells", "share of cells seen once", "near duplicates"),
    *("top opening", "top closing", "top parameters", "different openings"),
    *("follow-ups", "questions a request", "biased requests", "known-list hits", "length mean", "length sd"),
)
"""Names of the columns of ``vector``."""


def vector(states_N: States, centres_JB: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return [N, F]. A principal without any activations has zeros in their columns.

    Args:
        states_N: at least one request each.
        centres_JB: what a direction's bin stands for.
    """
    moments = states_N["moments"]
    n = moments["count"].sum(axis=1)
    both = {name: moments[name].sum(axis=1, dtype=np.float64) for name in _SUMS}
    spread = _spread(states_N, both["sketch"])
    return np.concatenate([_content(n, both), _top(states_N, centres_JB), spread, _traffic(states_N)], axis=1)


def member_vector(states_N: States) -> NDArray[np.float64]:
    """Return [N, G]: content of the scoring half alone, whose requests linked nobody."""
    moments = states_N["moments"][:, SCORING]
    return _content(moments["count"], {name: moments[name].astype(np.float64) for name in _SUMS})


def mean_sketch(states_N: States) -> NDArray[np.float64]:
    """Return the mean of the scoring half's sketches, [N, S]."""
    moments = states_N["moments"][:, SCORING]
    result: NDArray[np.float64] = moments["sketch"] / np.maximum(moments["count"], 1.0)[:, None]
    return result


def _content(n: NDArray[np.uint32], sums: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    by = np.maximum(n, 1).astype(np.float64)
    mean = sums["probe"] / by
    sd = np.sqrt(np.maximum(sums["probe_squared"] / by - mean**2, 0))
    return np.stack([mean, sd, sums["probe_positive"] / by, sums["probe_high"] / by], axis=1)


def _top(states_N: States, centres_JB: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean of the first probe's highest tenth, [N, 1], read off its histogram."""
    counts = states_N["history"][:, 0].astype(np.float64)
    wanted = np.maximum(TOP * counts.sum(axis=1, keepdims=True), 1)
    above = counts[:, ::-1].cumsum(axis=1)[:, ::-1] - counts
    taken = np.clip(wanted - above, 0, counts)
    result: NDArray[np.float64] = (taken * centres_JB[0]).sum(axis=1) / np.maximum(taken.sum(axis=1), 1e-9)
    return result[:, None]


def _spread(states_N: States, sums_NS: NDArray[np.float64]) -> NDArray[np.float64]:
    n = np.maximum(states_N["sketched"], 1).astype(np.float64)
    cells = ("cells_once", "cells_twice")
    once, twice = (np.bitwise_count(states_N[name]).sum(axis=1, dtype=np.int64) for name in cells)
    concentration = np.log1p(((sums_NS / n[:, None]) ** 2).sum(axis=1))
    return np.stack([concentration, once / n, (once - twice) / n, states_N["near_duplicates"] / n], axis=1)


def _traffic(states_N: States) -> NDArray[np.float64]:
    n = np.maximum(states_N["count"], 1).astype(np.float64)
    tops = [states_N[f"{name}_counts"].max(axis=1) / n for name in ("opening", "closing", "parameter")]
    mean = states_N["tokens"] / n
    sd = np.sqrt(np.maximum(states_N["tokens_squared"] / n - mean**2, 0))
    different = np.minimum(distinct(states_N["distinct_openings"]) / n, 1)
    rates = [states_N[name] / n for name in ("follow_ups", "questions", "biased_requests")]
    hits = states_N["list_hits"].max(axis=1) / n
    return np.stack([*tops, different, *rates, hits, mean, sd], axis=1)

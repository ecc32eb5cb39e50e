"""What a principal looks like after n requests, as a few numbers that grow with suspicion.

After the last checkpoint the recent requests are read in place of all: whoever was innocent for long would otherwise
dilute what comes next.

Of the activations they read the probe for all campaigns alone, not what requests are about: that tells families of
honest work apart, and the next family is another one.

Shape letters: N principals, B bins, F features.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.layout import CHECKPOINTS, EVERY, States
from spider_sense.extraction.profile import CLIP

__all__ = ["FEATURES", "highest", "looks", "recent_vector", "vector"]

TOP = 0.1
"""Share of the requests whose logits the top tenth averages: cover traffic does not dilute it."""

FEATURES = ("mean of the campaign probe", "top tenth of the campaign probe", "share of one opening")
"""Names of the columns of ``vector`` and ``recent_vector``."""


def looks(count_N: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.bool_]:
    """Return after which numbers of requests the level tier looks, [N]."""
    late = (count_N > CHECKPOINTS[-1]) & (count_N % EVERY == 0)
    return np.asarray(np.isin(count_N, CHECKPOINTS) | late)


def vector(states_N: States, centres_B: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return [N, F]. A principal without any activations has zeros in their columns.

    Args:
        states_N: at least one request each.
        centres_B: what a bin of the first probe stands for.
    """
    seen, count = np.maximum(states_N["sketched"], 1.0), np.maximum(states_N["count"], 1.0)
    mean = states_N["probe"].astype(np.float64) / seen
    top = _top(states_N["history"].astype(np.float64), centres_B)
    return np.stack([mean, top, states_N["opening_counts"].max(axis=1) / count], axis=1)


def recent_vector(states_N: States, centres_B: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the same, [N, F], with both numbers of the campaign probe read off the histogram that forgets.

    Args:
        states_N: at least one request each.
        centres_B: what a bin of the first probe stands for.
    """
    counts = states_N["recent"][:, 0].astype(np.float64)
    mean = (counts * centres_B).sum(axis=1) / np.maximum(counts.sum(axis=1), 1e-9)
    count = np.maximum(states_N["count"], 1.0)
    return np.stack([mean, _top(counts, centres_B), states_N["opening_counts"].max(axis=1) / count], axis=1)


def highest(centres_B: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return what no principal's features can exceed, [1, F]."""
    return np.array([[CLIP, centres_B.max(), 1.0]])


def _top(counts: NDArray[np.float64], centres_B: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean of the first probe's highest tenth, [N], read off its histogram, [N, B]."""
    wanted = np.maximum(TOP * counts.sum(axis=1, keepdims=True), 1)
    above = counts[:, ::-1].cumsum(axis=1)[:, ::-1] - counts
    taken = np.clip(wanted - above, 0, counts)
    result: NDArray[np.float64] = (taken * centres_B).sum(axis=1) / np.maximum(taken.sum(axis=1), 1e-9)
    return result

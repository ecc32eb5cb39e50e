"""The numbers of a request that a principal's own history is watched along.

Each is a fixed function of the request alone, so its rank among the earlier ones is a legal conformal p-value.

Shape letters: N requests, J directions, B bins.
"""

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.event import EventBatch
from spider_sense.extraction.layout import DIRECTIONS, PROBES

__all__ = ["COORDINATES", "binned", "directions"]

COORDINATES = DIRECTIONS - PROBES - 2
"""Leading sketch coordinates among the directions."""


def directions(batch: EventBatch) -> NDArray[np.float32]:
    """Return [N, J]: probe logits, leading sketch coordinates, the sketch's norm, ln(1 + prompt tokens)."""
    norm = np.linalg.norm(batch.sketch, axis=1, keepdims=True)
    length = np.log1p(batch.tokens).astype(np.float32)[:, None]
    return np.concatenate([batch.probes, batch.sketch[:, :COORDINATES], norm, length], axis=1, dtype=np.float32)


def binned(directions_NJ: NDArray[np.float32], edges: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the bin of each number, [N, J]: how many of its direction's edges, [J, B - 1], lie below it."""
    result: NDArray[np.int64] = (directions_NJ[:, :, None] > edges).sum(axis=2)
    return result

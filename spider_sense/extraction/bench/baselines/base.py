"""What every baseline is given of a stream.

Shape letters: T requests of a stream, N texts, D width of the embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.layout import CHECKPOINTS
from spider_sense.extraction.sketch import shrunk

__all__ = ["Background", "Baseline", "Doubles", "Trace", "at_checkpoints"]

Doubles = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Trace:
    """One principal's requests."""

    vector_TD: Floats
    """Of unit length."""
    times: Floats
    """Seconds, [T]."""
    rows: NDArray[np.int64]
    """Row of each text in the table of texts, [T]."""

    @cached_property
    def cosine_TT(self) -> Doubles:
        """Similarity of each request to each."""
        return np.asarray(self.vector_TD @ self.vector_TD.T, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Background:
    """Benign requests of the fit part, and numbers of every text against them."""

    texts_ND: Doubles
    """Every text, of unit length."""
    fit_rows: NDArray[np.int64]
    """The texts of the fit part's innocent principals."""
    fit_traces: Sequence[Trace]

    @cached_property
    def distance_N(self) -> Doubles:
        """Squared Mahalanobis distance of every text to the fit part's, with a shrunken covariance."""
        fit_MD = self.texts_ND[self.fit_rows]
        mean_D, covariance_DD = fit_MD.mean(0), np.cov(fit_MD, rowvar=False)
        centred_ND = self.texts_ND - mean_D
        distance: Doubles = np.einsum("nd,nd->n", centred_ND @ np.linalg.inv(shrunk(covariance_DD)), centred_ND)
        return distance


class Baseline(Protocol):
    """One method."""

    name: str

    def curve(self, trace: Trace) -> Doubles:
        """Return its statistic after each request, [T]; -inf where it says nothing yet."""
        ...


def at_checkpoints(trace: Trace) -> list[int]:
    """Return the numbers of requests at which methods that look now and then look at a stream."""
    return [count for count in CHECKPOINTS if count <= len(trace.rows)]

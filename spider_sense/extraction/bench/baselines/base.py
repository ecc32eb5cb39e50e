"""What every baseline is given of a stream.

Shape letters: T requests of a stream, N texts, D width of the embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Background", "Baseline", "Doubles", "Trace", "at_checkpoints"]

Doubles = NDArray[np.float64]

_CHECKPOINTS = (16, 32, 64, 128, 256, 512, 1024)
_SHRINKAGE = 0.1


@dataclass(frozen=True, eq=False)
class Trace:
    """One principal's requests."""

    vector_TD: Doubles
    """Of unit length."""
    times: Doubles
    """Seconds, [T]."""
    rows: NDArray[np.int64]
    """Row of each text in the table of texts, [T]."""

    @cached_property
    def cosine_TT(self) -> Doubles:
        """Similarity of each request to each."""
        return self.vector_TD @ self.vector_TD.T


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
        """Squared Mahalanobis distance of every text to the fit part's, with a covariance that is shrunk by 0.1."""
        fit_MD = self.texts_ND[self.fit_rows]
        mean_D, covariance_DD = fit_MD.mean(0), np.cov(fit_MD, rowvar=False)
        width = len(mean_D)
        covariance_DD = (1 - _SHRINKAGE) * covariance_DD + _SHRINKAGE * np.trace(covariance_DD) / width * np.eye(width)
        centred_ND = self.texts_ND - mean_D
        distance: Doubles = np.einsum("nd,nd->n", centred_ND @ np.linalg.inv(covariance_DD), centred_ND)
        return distance


class Baseline(Protocol):
    """One method."""

    name: str

    def curve(self, trace: Trace) -> Doubles:
        """Return its statistic after each request, [T]; -inf where it says nothing yet."""
        ...


def at_checkpoints(trace: Trace) -> list[int]:
    """Return the numbers of requests at which methods that look now and then look at a stream."""
    return [count for count in _CHECKPOINTS if count <= len(trace.rows)]

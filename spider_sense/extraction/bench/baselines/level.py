"""Methods that compare an account's requests with benign ones, at counts of 16, 32, 64 and so on.

Shape letters: T requests of a stream, N texts, R reference texts, A anchors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from spider_sense.extraction.bench.baselines.base import Background, Doubles, Trace, at_checkpoints

__all__ = ["Coverage", "Mahalanobis", "Mmd", "kernel", "median_distance"]

_SCALES = (0.5, 1.0, 2.0, 4.0)
_REFERENCES, _ANCHORS = 300, 128

Level = Callable[[Trace, int], float]


class _Standardised(ABC):
    """A level that is read at checkpoints, in units of its spread over the fit part's principals at that count."""

    def __init__(self, background: Background, *, two_sided: bool) -> None:
        self._two_sided = two_sided
        values: dict[int, list[float]] = {}
        for trace in background.fit_traces:
            for count in at_checkpoints(trace):
                values.setdefault(count, []).append(self._level(trace, count))
        self._scales: dict[int, tuple[float, float]] = {}
        for count, found in values.items():
            middle = float(np.median(found))
            self._scales[count] = middle, max(float(np.median(np.abs(np.array(found) - middle))), 1e-9)

    @abstractmethod
    def _level(self, trace: Trace, count: int) -> float:
        """Return the level after so many requests, in any unit."""

    def curve(self, trace: Trace) -> Doubles:
        """Return the level at the last checkpoint, [T]."""
        found = np.full(len(trace.rows), -np.inf)
        for count in at_checkpoints(trace):
            # Beyond the longest stream of the fit part, its longest checkpoint stands in.
            middle, spread = self._scales.get(count) or self._scales[max(self._scales)]
            value = (self._level(trace, count) - middle) / spread
            found[count - 1 :] = abs(value) if self._two_sided else value
        return found


class Mahalanobis(_Standardised):
    """Mean squared Mahalanobis distance of the requests to benign ones, too far or too near."""

    name = "Mahalanobis"

    def __init__(self, background: Background) -> None:
        self._distance_N = background.distance_N
        super().__init__(background, two_sided=True)

    def _level(self, trace: Trace, count: int) -> float:
        return float(self._distance_N[trace.rows[:count]].mean())


class Coverage(_Standardised):
    """Share of the anchors of feature space that an account has touched, too many or too few (CAP, IJCAI 2024/48)."""

    name = "coverage"

    def __init__(self, background: Background, seed: int = 0) -> None:
        from scipy.cluster.vq import kmeans2

        fit_MD = background.texts_ND[background.fit_rows]
        anchor_AD, _ = kmeans2(fit_MD, min(_ANCHORS, len(fit_MD) // 4), minit="++", seed=seed)
        distance_NA = (anchor_AD**2).sum(1) - 2 * background.texts_ND @ anchor_AD.T
        self._cell_N, self._cells = distance_NA.argmin(1), len(anchor_AD)
        super().__init__(background, two_sided=True)

    def _level(self, trace: Trace, count: int) -> float:
        return len(np.unique(self._cell_N[trace.rows[:count]])) / self._cells


class Mmd(_Standardised):
    """Unbiased squared maximum mean discrepancy to benign requests (arXiv 2606.05725): a mixture of Gaussian kernels.

    The bandwidths are 0.5, 1, 2 and 4 times the median distance; 300 benign requests are the reference.
    """

    name = "MMD"

    def __init__(self, background: Background, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        count = min(_REFERENCES, len(background.fit_rows))
        reference_RD = background.texts_ND[generator.choice(background.fit_rows, count, replace=False)]
        self._median = median_distance(reference_RD)
        own_RR = kernel(reference_RD @ reference_RD.T, self._median)
        self._own = _off_diagonal_mean(own_RR)
        self._to_reference_N = kernel(background.texts_ND @ reference_RD.T, self._median).mean(1)
        super().__init__(background, two_sided=False)

    def _level(self, trace: Trace, count: int) -> float:
        own = _off_diagonal_mean(kernel(trace.cosine_TT[:count, :count], self._median))
        return own + self._own - 2 * float(self._to_reference_N[trace.rows[:count]].mean())


def median_distance(rows_RD: Doubles) -> float:
    """Return the median squared distance between different rows of unit length."""
    cosine_RR = rows_RD @ rows_RD.T
    return float(np.median(2 - 2 * cosine_RR[np.triu_indices(len(rows_RD), 1)]))


def kernel(cosine: Doubles, median: float) -> Doubles:
    """Return the mean of the Gaussian kernels of rows of unit length with these cosines."""
    squared = np.maximum(2 - 2 * cosine, 0)
    mixture: Doubles = np.mean([np.exp(-squared / (scale * median)) for scale in _SCALES], axis=0)
    return mixture


def _off_diagonal_mean(kernel_TT: Doubles) -> float:
    count = len(kernel_TT)
    return float((kernel_TT.sum() - np.trace(kernel_TT)) / (count * (count - 1)))

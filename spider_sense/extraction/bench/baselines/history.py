"""Methods that look at an account's own requests alone.

Shape letters: T requests of a stream.
"""

import warnings

import numpy as np

from spider_sense.extraction.bench.baselines.base import Doubles, Trace

__all__ = ["NearDuplicates", "Prada", "RateLimit"]


class RateLimit:
    """Requests in the hour that ends with each request."""

    name = "rate limit"

    def curve(self, trace: Trace) -> Doubles:
        """Return the count after each request, [T]."""
        begin = np.searchsorted(trace.times, trace.times - 3600)
        counts: Doubles = np.arange(1, len(trace.times) + 1, dtype=np.float64) - begin
        return counts


class NearDuplicates:
    """Requests that nearly repeat an earlier one (SEAT, doi 10.1145/3474369.3486863), with a given embedding.

    Args:
        similarity: cosine from which a request counts.
    """

    name = "near duplicates"

    def __init__(self, similarity: float = 0.9) -> None:
        self._similarity = similarity

    def curve(self, trace: Trace) -> Doubles:
        """Return the count after each request, [T]."""
        earlier_TT = np.tril(trace.cosine_TT, -1)
        counts: Doubles = np.cumsum((earlier_TT > self._similarity).any(1)).astype(np.float64)
        return counts


class Prada:
    """How far the distances of new requests are from a normal distribution (arXiv 1805.02628).

    One growing set, as there are no classes; every ten requests from ``least`` distances on, 1 - W of Shapiro and Wilk
    after distances beyond three deviations are taken out. The original waits for 100 distances.

    Args:
        least: distances before the first test.
    """

    name = "PRADA"

    def __init__(self, least: int = 20) -> None:
        self._least = least

    def curve(self, trace: Trace) -> Doubles:
        """Return 1 - W after each request, [T]."""
        distance_TT = np.sqrt(np.maximum(2 - 2 * trace.cosine_TT, 0))
        distances: list[float] = []
        kept, threshold, current = [0], -np.inf, -np.inf
        found = np.full(len(trace.rows), -np.inf)
        for place in range(1, len(found)):
            nearest = float(distance_TT[place, kept].min())
            distances.append(nearest)
            if nearest > threshold:
                kept.append(place)
                ours = np.array(distances)
                threshold = max(threshold, float(ours.mean() - ours.std()))
            if len(distances) >= self._least and place % 10 == 0:
                current = _not_normal(np.array(distances))
            found[place] = current
        return found


def _not_normal(distances: Doubles) -> float:
    from scipy.stats import shapiro

    usual = distances[np.abs(distances - distances.mean()) <= 3 * distances.std()]
    if len(usual) < 3 or np.ptp(usual) < 1e-9:
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return 1.0 - float(shapiro(usual).statistic)

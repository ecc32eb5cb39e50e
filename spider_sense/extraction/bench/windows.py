"""MMD's own protocol (arXiv 2606.05725): windows of requests without principals, benign ones drawn from one pool.

The threshold is the 95th percentile of discrepancies between two benign windows; what is tested is the mean discrepancy
to twenty. A mixed window holds a share of a campaign's requests. Beside it stands what the protocol leaves out: how
often a real person's whole stream exceeds that threshold.

Shape letters: N texts, M windows, W requests of a window.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.bench.baselines.level import kernel, median_distance

__all__ = ["SHARES", "Discrepancy", "window_rates"]

Doubles = NDArray[np.float64]
Rows = NDArray[np.int64]

SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)

_NULL, _TESTS, _REFERENCES = 1000, 200, 20
_POOL = 3000
"""Benign texts at most: a matrix of all pairs is kept."""


class Discrepancy:
    """Unbiased squared maximum mean discrepancy between windows over one table of texts.

    Args:
        unit_ND: vectors of the texts, of unit length.
        median: median squared distance of benign texts, which sets the bandwidths.
    """

    def __init__(self, unit_ND: Doubles, median: float) -> None:
        self._kernel_NN = kernel(unit_ND @ unit_ND.T, median)

    def between(self, one: Sequence[Rows], other: Sequence[Rows]) -> Doubles:
        """Return the discrepancy [M, M'] of each of M windows to each of M' others, given as rows of the table."""
        one_MN, other_MN = self._counts(one), self._counts(other)
        toward_MN = one_MN @ self._kernel_NN
        across = toward_MN @ other_MN.T / np.outer(one_MN.sum(1), other_MN.sum(1))
        own = self._own(one_MN, toward_MN)[:, None] + self._own(other_MN, other_MN @ self._kernel_NN)
        result: Doubles = own - 2 * across
        return result

    def _counts(self, windows: Sequence[Rows]) -> Doubles:
        return np.stack([np.bincount(rows, minlength=len(self._kernel_NN)) for rows in windows]).astype(np.float64)

    @staticmethod
    def _own(count_MN: Doubles, toward_MN: Doubles) -> Doubles:
        size = count_MN.sum(1)
        result: Doubles = ((toward_MN * count_MN).sum(1) - size) / (size * (size - 1))
        return result


def window_rates(
    unit_ND: Doubles, benign: Rows, campaigns: Mapping[str, Rows], people: Sequence[Rows], window: int, seed: int
) -> dict[str, float | None]:
    """Return the share of windows above the threshold.

    Args:
        unit_ND: vectors of all texts, of unit length.
        benign: the pool's texts; a third makes references, a third the null, a third the tests, so that what sets
            the threshold is as far from the references as what is tested.
        campaigns: the texts of each campaign.
        people: the texts of real people, each a whole stream.
        window: W; texts are drawn with replacement, as published windows overlap.
        seed: of all draws.

    Returns:
        ``benign``, a key for each share, averaged over campaigns, and ``people``, None where there is nobody.
    """
    generator = np.random.default_rng(seed)
    benign = generator.permutation(benign)[:_POOL]
    reference, other, test = np.array_split(benign, 3)
    used = np.unique(np.concatenate([benign, *campaigns.values(), *people]))
    place = np.full(len(unit_ND), -1)
    place[used] = np.arange(len(used))
    discrepancy = Discrepancy(unit_ND[used], median_distance(unit_ND[reference[:500]]))

    def draw(pool: Rows, count: int) -> Rows:
        drawn: Rows = place[generator.choice(pool, count)]
        return drawn

    null = [
        discrepancy.between([draw(other, window)], [draw(reference, window) for _ in range(_REFERENCES)])
        for _ in range(_NULL // _REFERENCES)
    ]
    threshold = float(np.quantile(np.concatenate(null, axis=None), 0.95))
    references = [draw(reference, window) for _ in range(_REFERENCES)]

    def flagged(windows: Sequence[Rows]) -> float:
        return float(np.mean(discrepancy.between(windows, references).mean(1) > threshold))

    found: dict[str, float | None] = {"benign": flagged([draw(test, window) for _ in range(_TESTS)])}
    for share in SHARES:
        bad = round(share * window)
        mixed = [
            np.concatenate([draw(rows, bad), draw(test, window - bad)])
            for rows in campaigns.values()
            for _ in range(max(1, _TESTS // len(campaigns)))
        ]
        found[f"{share:g}"] = flagged(mixed)
    found["people"] = flagged([place[rows] for rows in people]) if people else None
    return found

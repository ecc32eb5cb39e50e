"""MMD's own protocol (arXiv 2606.05725): windows of requests without principals, benign ones drawn from one pool.

A mixed window holds a share of a campaign's requests. For MMD the threshold is the 95th percentile of discrepancies
between two benign windows, and what is tested is the mean discrepancy to twenty. Another score has the threshold that
1% of benign windows exceed. Beside both stands what the protocol leaves out: how often a real person's whole stream
exceeds that threshold.

Shape letters: N texts, M windows, W requests of a window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spider_sense.extraction.bench.baselines.level import kernel, median_distance

__all__ = ["SHARES", "Discrepancy", "Windows", "mmd_rates", "score_rates"]

Doubles = NDArray[np.float64]
Rows = NDArray[np.int64]

SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)

_NULL, _TESTS, _REFERENCES = 1000, 200, 20
_SHARE = 0.01
"""Of benign windows, above the threshold of a score that is not MMD's."""
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


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows as rows of the table of texts; a third of the pool makes references, a third the null, a third the tests,
    so that what sets a threshold is as far from the references as what is tested."""

    reference: Rows
    """Texts that references are drawn from."""
    other: Rows
    """Texts that the null is drawn from."""
    tested: Mapping[str, Sequence[Rows]]
    """``benign``, each share, campaigns together, and ``people``."""
    size: int
    generator: np.random.Generator

    @classmethod
    def draw(
        cls, benign: Rows, campaigns: Mapping[str, Rows], people: Sequence[Rows], window: int, seed: int
    ) -> "Windows":
        """Draw windows of W requests, with replacement, as published windows overlap.

        Args:
            benign: the pool's texts.
            campaigns: the texts of each campaign.
            people: the texts of real people, each a whole stream.
            window: W.
            seed: of all draws.
        """
        generator = np.random.default_rng(seed)
        reference, other, test = np.array_split(generator.permutation(benign)[:_POOL], 3)
        tested: dict[str, Sequence[Rows]] = {"benign": [generator.choice(test, window) for _ in range(_TESTS)]}
        for share in SHARES:
            bad = round(share * window)
            tested[f"{share:g}"] = [
                # Anywhere in the window: a score may look at the order.
                generator.permutation(
                    np.concatenate([generator.choice(rows, bad), generator.choice(test, window - bad)])
                )
                for rows in campaigns.values()
                for _ in range(max(1, _TESTS // len(campaigns)))
            ]
        return cls(reference, other, tested | {"people": people}, window, generator)

    def of(self, pool: Rows, count: int) -> list[Rows]:
        """Return so many windows of a pool."""
        return [self.generator.choice(pool, self.size) for _ in range(count)]

    def above(self, score: Callable[[Sequence[Rows]], Doubles], threshold: float) -> dict[str, float | None]:
        """Return the share of the tested windows whose score exceeds a threshold, None where there is none."""
        return {name: float(np.mean(score(rows) > threshold)) if rows else None for name, rows in self.tested.items()}


def mmd_rates(unit_ND: Doubles, windows: Windows) -> dict[str, float | None]:
    """Return the share of windows that MMD finds, by what they are.

    Args:
        unit_ND: vectors of all texts, of unit length.
        windows: drawn from them.
    """
    drawn = [rows for found in windows.tested.values() for rows in found]
    used = np.unique(np.concatenate([windows.reference, windows.other, *drawn]))
    place = np.full(len(unit_ND), -1)
    place[used] = np.arange(len(used))
    discrepancy = Discrepancy(unit_ND[used], median_distance(unit_ND[windows.reference[:500]]))

    def between(some: Sequence[Rows], references: Sequence[Rows]) -> Doubles:
        return discrepancy.between([place[rows] for rows in some], [place[rows] for rows in references])

    null = [
        between(windows.of(windows.other, 1), windows.of(windows.reference, _REFERENCES))
        for _ in range(_NULL // _REFERENCES)
    ]
    references = windows.of(windows.reference, _REFERENCES)
    threshold = float(np.quantile(np.concatenate(null, axis=None), 0.95))
    return windows.above(lambda some: between(some, references).mean(1), threshold)


def score_rates(score: Callable[[Sequence[Rows]], Doubles], windows: Windows) -> dict[str, float | None]:
    """Return the share of windows that a score finds at 1% of benign ones, by what they are."""
    null = score(windows.of(windows.other, _NULL))
    return windows.above(score, float(np.quantile(null, 1 - _SHARE, method="higher")))

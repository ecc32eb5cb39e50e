"""Scores and labels of two classes."""

import numpy as np
import numpy.typing as npt

__all__ = ["Rows", "gaussian", "rows_of"]

Rows = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]


def rows_of(positives: list[float], negatives: list[float]) -> Rows:
    labels = np.arange(len(positives) + len(negatives)) < len(positives)
    return np.array(positives + negatives, dtype=np.float64), labels


def gaussian(shift: float, n: int = 400, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    return rows_of(generator.normal(shift, 1, n).tolist(), generator.normal(0, 1, n).tolist())

"""False-discovery control over principals: whom to act on, if at most a share of them may be honest."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["benjamini_hochberg"]


def benjamini_hochberg(p_values: NDArray[np.float64], rate: float) -> NDArray[np.bool_]:
    """Select by Benjamini and Hochberg 1995, [N]; valid for conformal p-values that share their calibration set.

    Args:
        p_values: [N].
        rate: bound on the expected share of honest ones among the selected.
    """
    order = np.argsort(p_values, kind="stable")
    fits = p_values[order] <= rate * np.arange(1, len(order) + 1) / max(len(order), 1)
    chosen = np.zeros(len(order), dtype=bool)
    if fits.any():
        chosen[order[: np.flatnonzero(fits)[-1] + 1]] = True
    return chosen

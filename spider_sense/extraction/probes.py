"""The probes for campaigns, and what they say of requests that they were not fitted on.

The first probe is for all campaigns together: a campaign that no probe was fitted on resembles the others in that. Each
family has one of its own besides.

Shape letters: N benign requests, M requests of a family, D width, P probes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from spider_sense.errors import DataError, MissingExtraError
from spider_sense.extraction.layout import PROBES

__all__ = ["ANY", "crossed", "fit_probes", "once_each"]

ANY = "any campaign"
PENALTY = 0.01
FOLDS = 3

Floats = NDArray[np.float32]
Families = Mapping[str, Floats]
Probe = tuple[NDArray[np.float64], float]


def once_each(principals: Sequence[str]) -> NDArray[np.float64]:
    """Return the weight of each request, [N], under which every principal weighs 1."""
    _, owner_N, counts = np.unique(np.array(principals), return_inverse=True, return_counts=True)
    result: NDArray[np.float64] = 1.0 / counts[owner_N]
    return result


def fit_probes(benign_ND: Floats, weight_N: NDArray[np.float64], families: Families) -> dict[str, Probe]:
    """Fit a probe for all families together, and one for each; weights [D] and a bias by name.

    Args:
        benign_ND: mean hidden states of honest requests.
        weight_N: of each.
        families: mean hidden states of each family's requests, [M, D].

    Raises:
        DataError: if there are too many families.
        MissingExtraError: if scikit-learn is not installed.
    """
    if len(families) >= PROBES:
        raise DataError(f"{len(families)} families: {', '.join(families)}; at most {PROBES - 1} are allowed: join some")
    if not families:
        return {}
    honest = _distinct(benign_ND, weight_N)
    each = {name: _probe(*honest, *_even([rows])) for name, rows in families.items()}
    return {ANY: _probe(*honest, *_even(list(families.values())))} | each


def crossed(benign_ND: Floats, weight_N: NDArray[np.float64], work: Sequence[str], families: Families) -> Floats:
    """Return what the probe for all campaigns says of honest requests whose kind of work it never saw, [N].

    What is usual must not be learned from the numbers that a probe gives to its own examples: those are tamer than a
    stranger's. Kinds of work are dealt into 3 parts; each part is read by a probe of the others.

    Args:
        benign_ND: mean hidden states of honest requests.
        weight_N: of each.
        work: what each request's principal does, N names; nothing is known of one without a name but its principal's.
        families: mean hidden states of each family's requests, [M, D].
    """
    _, kind_N = np.unique(np.array(work), return_inverse=True)
    logits_N = np.empty(len(benign_ND), dtype=np.float32)
    for fold in range(FOLDS):
        out_N = kind_N % FOLDS == fold
        # A single kind of work has no other.
        kept_N = out_N if out_N.all() else ~out_N
        weight, bias = _probe(*_distinct(benign_ND[kept_N], weight_N[kept_N]), *_even(list(families.values())))
        logits_N[out_N] = benign_ND[out_N] @ weight + bias
    return logits_N


def _even(families: Sequence[Floats]) -> tuple[Floats, NDArray[np.float64]]:
    """Return the requests of families, and weights under which all families weigh the same."""
    return np.concatenate(families), np.concatenate([np.full(len(rows), 1 / len(rows)) for rows in families])


def _distinct(rows_ND: Floats, weight_N: NDArray[np.float64]) -> tuple[Floats, NDArray[np.float64]]:
    """Return every row once, with the sum of its weights: logs repeat themselves, and a fit's time goes with rows."""
    bytes_N = np.ascontiguousarray(rows_ND).view(np.dtype((np.void, rows_ND.dtype.itemsize * rows_ND.shape[1])))[:, 0]
    _, first, which = np.unique(bytes_N, return_index=True, return_inverse=True)
    return rows_ND[first], np.asarray(np.bincount(which, weight_N), dtype=np.float64)


def _probe(
    benign_ND: Floats, weight_N: NDArray[np.float64], positive_MD: Floats, weight_M: NDArray[np.float64]
) -> Probe:
    """Fit a logistic regression in standardised space; both classes weigh the same."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    both = np.concatenate([benign_ND, positive_MD]).astype(np.float64)
    weights = np.concatenate([weight_N / weight_N.sum(), weight_M / weight_M.sum()])
    mean, scale = both.mean(axis=0), both.std(axis=0) + 1e-6
    model = LogisticRegression(C=PENALTY, max_iter=2000)
    labels = np.repeat([0, 1], [len(benign_ND), len(positive_MD)])
    model.fit((both - mean) / scale, labels, sample_weight=weights * len(both) / 2)
    weight = np.asarray(model.coef_[0], dtype=np.float64) / scale
    return weight, float(model.intercept_[0] - mean @ weight)

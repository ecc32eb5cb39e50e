"""The sketch: 64 numbers of a request, and the logits of the extraction probes.

Both are linear in the mean hidden state of the prompt, that of ``h / rms(h)`` over its tokens, so ordinary heads of a
guard compute them in the hot path.

Shape letters: N requests, D width, S sketch, P probes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spider_sense.errors import DataError, MissingExtraError
from spider_sense.extraction.layout import SKETCH
from spider_sense.extraction.probes import fit_probes
from spider_sense.scoring import Aggregator, Probe, SiteMap
from spider_sense.types import Site

__all__ = ["Sketch", "mean_heads", "shrunk"]

SHRINKAGE = 0.1
"""Weight of the mean variance in a shrunken covariance."""
LEAST = 100
"""Benign requests that a fit needs."""


def mean_heads(
    site: Site, weight_DH: NDArray[np.float32], bias_H: NDArray[np.float32], names: Sequence[str]
) -> list[Probe]:
    """Return H heads whose readouts are ``mean(h / rms(h)) @ weight + bias`` so far.

    At the last prompt token that is the mean over the prompt. The span is all tokens, because a head that folds prompts
    alone cannot resume from a KV block of an answer.
    """
    weight, bias = torch.from_numpy(weight_DH), torch.from_numpy(bias_H)
    mean = Aggregator(kind="mean", span="all")
    return [
        Probe(name, "extraction", mean, {site: SiteMap(weight[:, [head]], bias[[head]])})
        for head, name in enumerate(names)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """Projections of the mean hidden state: of ``h / rms(h)`` over a prompt's tokens.

    The sketch whitens what differs between the requests of one benign principal (covariance W) and orders the
    coordinates by how much more the principals differ from one another (covariance B): the leading eigenvectors of
    ``B v = lambda W v``.
    """

    mean: NDArray[np.float32]
    """[D], of benign requests, every principal weighing the same."""
    projection: NDArray[np.float32]
    """[D, 64]"""
    weights: NDArray[np.float32]
    """[D, P], of the probes."""
    biases: NDArray[np.float32]
    """[P]"""
    names: tuple[str, ...]
    """Of the probes, P."""

    @classmethod
    def fit(
        cls, hidden_ND: NDArray[np.float32], principals: Sequence[str], families: Mapping[str, NDArray[np.float32]]
    ) -> "Sketch":
        """Fit on benign requests; a probe for all campaigns, and one for each family, against all of them.

        Args:
            hidden_ND: mean hidden states of benign requests.
            principals: whose each is, N names; a principal's requests weigh one together.
            families: mean hidden states of each campaign family's requests, at most 7 families.

        Raises:
            DataError: if there are too few requests or principals, or too many families.
            MissingExtraError: if scipy or scikit-learn is not installed.
        """
        if len(principals) != len(hidden_ND):
            raise DataError(f"{len(principals)} principals for {len(hidden_ND)} requests; give one for each")
        names, owner_N, counts = np.unique(np.array(principals), return_inverse=True, return_counts=True)
        if len(hidden_ND) < LEAST or len(names) < 2 or hidden_ND.shape[1] < SKETCH:
            raise DataError(
                f"a sketch cannot be fitted on {len(hidden_ND)} requests of {len(names)} principals with "
                f"{hidden_ND.shape[1]} numbers each; at least {LEAST} requests of 2 principals and {SKETCH} are needed"
            )
        weight_N = 1.0 / counts[owner_N]
        means = np.stack([np.bincount(owner_N, column * weight_N) for column in hidden_ND.T.astype(np.float64)], axis=1)
        mean = means.mean(axis=0)
        within_ND = hidden_ND - means[owner_N]
        within = shrunk((within_ND * weight_N[:, None]).T @ within_ND / len(names))
        between = (means - mean).T @ (means - mean) / len(names)
        projection = _leading(between, within)
        probes = fit_probes(hidden_ND, weight_N, families)
        weights = np.stack([weight for weight, _ in probes.values()], axis=1) if probes else np.zeros((len(mean), 0))
        biases = np.array([bias for _, bias in probes.values()])
        return cls(
            mean=mean.astype(np.float32),
            projection=projection.astype(np.float32),
            weights=weights.astype(np.float32),
            biases=biases.astype(np.float32),
            names=tuple(probes),
        )

    def project(self, hidden_ND: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return sketches [N, 64] and probe logits [N, P]."""
        sketch_NS, probes_NP = (hidden_ND - self.mean) @ self.projection, hidden_ND @ self.weights + self.biases
        return sketch_NS.astype(np.float32), probes_NP.astype(np.float32)

    def heads(self, site: Site) -> list[Probe]:
        """Return 64 + P heads of a guard whose readouts at the end of a prompt are sketch and probe logits."""
        names = [f"extraction.sketch.{index}" for index in range(SKETCH)]
        names += [f"extraction.{name}" for name in self.names]
        weight_DH = np.concatenate([self.projection, self.weights], axis=1)
        return mean_heads(site, weight_DH, np.concatenate([-self.mean @ self.projection, self.biases]), names)


def shrunk(covariance: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return a covariance that is mixed with a round one of the same trace."""
    size = len(covariance)
    result: NDArray[np.float64] = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / size * np.eye(size)
    return result


def _leading(between: NDArray[np.float64], within: NDArray[np.float64]) -> NDArray[np.float64]:
    try:
        from scipy.linalg import eigh
    except ImportError as error:
        raise MissingExtraError("scipy", "train") from error
    _, vectors = eigh(between, within)
    result = np.asarray(vectors, dtype=np.float64)[:, ::-1][:, :SKETCH]
    # An eigenvector's sign is arbitrary; fixed here, a fit repeats bit by bit.
    largest = np.take_along_axis(result, np.abs(result).argmax(axis=0)[None], axis=0)
    signed: NDArray[np.float64] = result * np.sign(largest)
    return signed

"""Training conversations as features: packed rows, conversation means, standardisation.

Shape letters: N training conversations, B conversations of a batch, R packed rows, n longest conversation of a batch,
F features of a token (all chosen sites side by side), P sites, D width, K logit columns.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.errors import ConfigError, DataError, nearest
from spider_sense.types import Site

__all__ = ["Packing", "TrainingSet", "fold", "moments"]

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

SAMPLE = 20_000
"""Tokens from which a coordinate's mean and deviation are estimated."""
FLOOR = 1e-3
"""Added to a deviation, so that a coordinate that hardly moves in training is not blown up."""
CHUNK = 64
"""Conversations that are averaged at a time."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the rows of a batch of conversations lie, one conversation after the other."""

    row_R: Tensor
    """Index into the rows of the activation set, int64."""
    owner_R: Tensor
    """Which conversation of the batch, int64."""
    column_R: Tensor
    """Which row of that conversation, int64."""
    valid_Bn: Tensor
    """bool, False for padding; conversations are left-aligned."""

    @classmethod
    def of(cls, start_B: Indices, length_B: Indices) -> "Packing":
        """Pack the first ``length_B`` rows from ``start_B`` on."""
        start, length = torch.from_numpy(start_B), torch.from_numpy(length_B)
        owner_R = torch.repeat_interleave(length)
        column_R = torch.arange(len(owner_R)) - (length.cumsum(0) - length)[owner_R]
        valid_Bn = torch.arange(int(length.max())) < length[:, None]
        return cls(start[owner_R] + column_R, owner_R, column_R, valid_Bn)

    def pad(self, x_RK: Tensor) -> Tensor:
        """Return packed rows as [B, n, K], padding 0; differentiable."""
        batch, n = self.valid_Bn.shape
        flat = x_RK.new_zeros(batch * n, x_RK.shape[1]).index_copy(0, self.owner_R * n + self.column_R, x_RK)
        return flat.view(batch, n, -1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSet:
    """The conversations that a probe is fitted on, and the sites that it reads."""

    data: ActivationSet
    sites: tuple[Site, ...]
    start_N: Indices
    """First row of each conversation in the activation set."""
    prompt_N: Indices
    """Its prompt rows."""
    total_N: Indices
    """Its rows in all."""
    label_N: Bools
    weight_N: Doubles
    """Weight of each conversation in the loss, mean 1."""

    @classmethod
    def of(
        cls, data: ActivationSet, train: Indices, labels: Bools, sites: tuple[Site, ...], weights: Doubles | None
    ) -> "TrainingSet":
        """Check and choose.

        Args:
            data: the captured conversations.
            train: which of them to fit on.
            labels: label of each conversation of ``data``, True for a positive.
            sites: what to read.
            weights: weight of each conversation of ``data``, or None for all alike.

        Raises:
            ConfigError: if there is no site, a site is named twice, or it was not captured.
            DataError: if labels or weights do not fit, a class is missing, or a conversation has no prompt row.
        """
        _check_sites(sites, data.sites)
        weight_N = _weights(weights, len(data.ids))[train]
        if labels.shape != (len(data.ids),):
            raise DataError(f"{len(data.ids)} conversations and labels of shape {labels.shape}; give one label each")
        positives = int(np.count_nonzero(labels[train] & (weight_N > 0)))
        negatives = int(np.count_nonzero(~labels[train] & (weight_N > 0)))
        if not positives or not negatives:
            raise DataError(
                f"{positives} positives and {negatives} negatives to train on; a probe needs conversations of both "
                "classes with a weight above 0"
            )
        empty = [data.ids[index] for index in train[data.prompt_rows[train] < 1]]
        if empty:
            raise DataError(f"{len(empty)} conversations have no prompt row, the first is {empty[0]!r}; leave them out")
        starts = data.starts.astype(np.int64)
        return cls(
            data=data,
            sites=sites,
            start_N=starts[train],
            prompt_N=data.prompt_rows[train].astype(np.int64),
            total_N=np.diff(starts)[train],
            label_N=labels[train].astype(np.bool_),
            weight_N=weight_N / weight_N.mean(),
        )

    def gather(self, row_R: Tensor) -> Tensor:
        """Return rows of the activation set as float32 features [R, F], a fresh tensor."""
        _, captured, width = self.data.hidden.shape
        site_P = torch.tensor(self.data.site_index(self.sites))
        index = (row_R[:, None] * captured + site_P).flatten()
        return self.data.hidden.reshape(-1, width).index_select(0, index).float().view(len(row_R), -1)

    def conversation_means(self) -> Doubles:
        """Return the mean feature over the prompt rows of each conversation, [N, F]."""
        means = []
        for first in range(0, len(self.start_N), CHUNK):
            chunk = slice(first, first + CHUNK)
            packing = Packing.of(self.start_N[chunk], self.prompt_N[chunk])
            x_RF = self.gather(packing.row_R)
            sum_BF = torch.zeros(len(packing.valid_Bn), x_RF.shape[1]).index_add_(0, packing.owner_R, x_RF)
            means.append(sum_BF.double().numpy() / self.prompt_N[chunk, None])
        return np.concatenate(means)

    def token_moments(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return each feature's mean and deviation over a sample of the tokens, float32 [F] both."""
        row_R = Packing.of(self.start_N, self.total_N).row_R
        sample = torch.randperm(len(row_R), generator=generator)[:SAMPLE].sort().values
        mean_F, deviation_F = moments(self.gather(row_R[sample]).double().numpy())
        return torch.from_numpy(mean_F).float(), torch.from_numpy(deviation_F).float()


def moments(x_RF: Doubles) -> tuple[Doubles, Doubles]:
    """Return the mean and the deviation of each feature, the latter never 0."""
    return x_RF.mean(0), x_RF.std(0) + FLOOR


def fold(weight_FK: Tensor, bias_K: Tensor, mean_F: Tensor, deviation_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and bias on raw features that equal the given ones on standardised features, float64."""
    raw_FK = weight_FK.double() / deviation_F.double()[:, None]
    return raw_FK, bias_K.double() - mean_F.double() @ raw_FK


def _check_sites(sites: tuple[Site, ...], captured: tuple[Site, ...]) -> None:
    if not sites or len(set(sites)) != len(sites):
        named = ", ".join(map(str, sites)) or "none"
        raise ConfigError(f"sites to read: {named}; name at least one, and each once")
    for site in sites:
        if site not in captured:
            raise ConfigError(f"site {site} was not captured; {nearest(str(site), map(str, captured))}")


def _weights(weights: Doubles | None, conversations: int) -> Doubles:
    if weights is None:
        return np.ones(conversations)
    if weights.shape != (conversations,):
        raise DataError(f"{conversations} conversations and weights of shape {weights.shape}; give one weight each")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise DataError("a conversation's weight is negative or not finite; weights must be numbers from 0 up")
    return weights.astype(np.float64)

"""The one training loop of all families that are fitted by gradient descent.

A step gathers the rows of its conversations once, scores them with one product, pools, and takes AdamW's step under a
one-cycle schedule. Half of the draws of a conversation with a response see its prompt alone, because the probe is read
at the end of the prompt as well as at every token after it. All randomness comes from the seed; the global generators
are left alone.

Shape letters: R packed rows, F features of a token, K logit columns, M hidden units, B conversations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import Parameter

from spider_sense.scoring import Aggregator
from spider_sense.training.features import Packing, TrainingSet, fold
from spider_sense.training.losses import Loss
from spider_sense.training.options import FitOptions

__all__ = ["Design", "TokenModel", "train"]

GAIN = 8.0
"""Logits are features times weights times GAIN / sqrt(F): one learning rate then suits every width."""
VALUE_SCALE = 0.01
"""Deviation of a value's first weights; a query starts at 0, so that attention starts as the mean."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What distinguishes one gradient-trained family from the others."""

    aggregator: Aggregator
    """Reads the token logits at inference; says how many columns there are."""
    loss: Loss
    hidden: int = 0
    """Hidden units of an MLP with one column; 0 for a linear map."""


class TokenModel(torch.nn.Module):
    """Token logits from features, standardised inside.

    Args:
        design: the family.
        mean_F: mean of each feature.
        deviation_F: deviation of each feature, positive.
        generator: draws the first weights.
    """

    def __init__(self, design: Design, mean_F: Tensor, deviation_F: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        features, columns = len(mean_F), design.aggregator.columns
        queries = columns - design.aggregator.parts
        self.mean_F, self.deviation_F = mean_F, deviation_F
        self.gain = GAIN / math.sqrt(features)
        first = torch.randn(features, design.hidden or columns, generator=generator)
        first *= 1 / GAIN if design.hidden else VALUE_SCALE
        if queries:
            first[:, :queries] = 0.0
        self.weight = Parameter(first)
        self.bias = Parameter(torch.zeros(1))
        self.biased_K = torch.nn.functional.one_hot(torch.tensor(queries), columns).float()
        if design.hidden:
            self.hidden_bias = Parameter(torch.zeros(design.hidden))
            self.second = Parameter(torch.randn(design.hidden, 1, generator=generator) / math.sqrt(design.hidden))

    def forward(self, centred_RF: Tensor, keep: float = 1.0) -> Tensor:
        """Return token logits [R, K] of features less their mean, of which dropout kept a share ``keep``."""
        y = centred_RF @ (self.weight * (self.gain / keep / self.deviation_F)[:, None])
        if hasattr(self, "second"):
            y = (y + self.hidden_bias).relu() @ self.second
        logits_RK: Tensor = y + self.bias * self.biased_K
        return logits_RK

    def folded(self) -> list[Tensor]:
        """Return weight and bias on raw features, then those of the second layer if there is one; float32."""
        bias = self.bias * self.biased_K
        tail = [self.second, bias] if hasattr(self, "second") else []
        head = fold(self.weight * self.gain, self.hidden_bias if tail else bias, self.mean_F, self.deviation_F)
        return [tensor.detach().float() for tensor in (*head, *tail)]


def train(
    design: Design, rows: TrainingSet, options: FitOptions, progress: Callable[[float], None] | None = None
) -> TokenModel:
    """Fit a family.

    Args:
        design: the family.
        rows: what to fit on.
        options: epochs, learning rate, weight decay, dropout, batch and seed are read here.
        progress: is told the share that is done, after every step.
    """
    generator = torch.Generator().manual_seed(options.seed)
    model = TokenModel(design, *rows.token_moments(generator), generator)
    optimizer = torch.optim.AdamW(_groups(model, options.weight_decay), lr=options.learning_rate)
    steps = _plan(rows, options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=len(steps))
    positive = torch.tensor(rows.weight_N[~rows.label_N].sum() / rows.weight_N[rows.label_N].sum()).float()
    for done, (index_B, length_B) in enumerate(steps, start=1):
        packing = Packing.of(rows.start_N[index_B], length_B)
        centred_RF = rows.gather(packing.row_R).sub_(model.mean_F)
        keep = _drop(centred_RF, options.dropout, generator)
        target_B = torch.from_numpy(rows.label_N[index_B]).float()
        loss_B = design.loss(packing.pad(model(centred_RF, keep)), packing.valid_Bn, target_B, positive)
        loss = (loss_B * torch.from_numpy(rows.weight_N[index_B]).float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(done / len(steps))
    return model


def _groups(model: TokenModel, weight_decay: float) -> list[dict[str, object]]:
    parameters = list(model.parameters())
    return [
        {"params": [item for item in parameters if item.dim() == 2], "weight_decay": weight_decay},
        {"params": [item for item in parameters if item.dim() == 1], "weight_decay": 0.0},
    ]


def _plan(rows: TrainingSet, options: FitOptions) -> list[tuple[Indices, Indices]]:
    """Return which conversations each step sees, and how many rows of each; those of a step are of similar length."""
    random = np.random.default_rng(options.seed)
    conversations, steps = len(rows.start_N), list[tuple[Indices, Indices]]()
    for _ in range(options.epochs):
        length_N = np.where(random.random(conversations) < 0.5, rows.total_N, rows.prompt_N)
        order_N = np.argsort(length_N * random.uniform(0.7, 1.3, conversations), kind="stable")
        batches = [order_N[first : first + options.batch] for first in range(0, conversations, options.batch)]
        steps.extend((batches[index], length_N[batches[index]]) for index in random.permutation(len(batches)))
    return steps


def _drop(x_RF: Tensor, share: float, generator: torch.Generator) -> float:
    """Zero a random share of the features in place and return the share that was kept.

    One random word decides on eight features, byte by byte: several times faster than a Bernoulli draw for each, which
    would take longer than the rest of the step.
    """
    limit = min(round(256 * share), 255)
    if limit:
        words = torch.empty(-(-x_RF.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        x_RF.mul_((words.view(torch.uint8)[: x_RF.numel()] >= limit).view_as(x_RF))
    return 1 - limit / 256

"""A bank of random probes of every kind, and steps of a model that it reads.

Shape letters: T packed rows, D width, C logit columns, CP stored columns, H heads.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sense_kernels import (
    PROMPT,
    RESPONSE,
    WATCHED,
    FoldRows,
    Lane,
    LaneTable,
    new_scratch,
    pack_weight,
    split_weight,
)

__all__ = ["EPS", "KINDS", "Bank", "Probe", "Site", "Step", "random_bank", "random_step"]

EPS = 1e-6

KINDS = ("mean", "max", "ema_max", "softmax", "attention", "cusum", "rolling_mean_max", "rolling_attention")
"""Kinds of heads in turn; softmax is attention whose value column is its query column."""
_WINDOW = {"ema_max": 10, "rolling_mean_max": 16, "rolling_attention": 10}
_PARAM = {"ema_max": 0.1, "softmax": 0.2, "cusum": 0.1}

Site = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""weight [D, CP], bias, mlp_weight, mlp_bias, low half of the weight or None; as of ``sense_kernels.score_fold``."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One head by itself, as the baseline that loops over probes holds it."""

    lane: Lane
    """Its lane in the bank."""
    site: int
    weight: Tensor
    """[D, 1], or [D, 2] with the query column last; float32."""


@dataclass(frozen=True, slots=True)
class Bank:
    """Probes packed by site: the columns of a site lie next to each other."""

    probes: tuple[Probe, ...]
    sites: tuple[Site, ...]
    table: LaneTable
    columns: int
    """Logit columns of all sites together."""

    def new_logits(self, rows: int) -> tuple[Tensor, list[Tensor]]:
        """Return a buffer [T, C], and the slice of each site."""
        logits_TC = torch.empty(rows, self.columns, device=self.table.value.device)
        return logits_TC, list(logits_TC.split([len(site[1]) for site in self.sites], 1))

    def whole_weights(self) -> list[Tensor]:
        """Return the stored weight of each site in float32, [D, CP]."""
        return [weight.float() if low is None else weight.float() + low.float() for weight, *_, low in self.sites]

    def new_scratch(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the working memory of the scoring kernel; nothing on a CPU."""
        weights = [site[0] for site in self.sites]
        columns = max(weight.shape[1] for weight in weights)
        on_cpu = weights[0].device.type == "cpu"
        return (None, None) if on_cpu else tuple(new_scratch(len(weights[0]), columns, weights[0].device))


def random_bank(width: int, heads: int, sites: int, dtype: torch.dtype, device: torch.device) -> Bank:
    """Return heads of all kinds, spread evenly over the sites.

    Args:
        width: D.
        heads: H.
        sites: at most so many as heads.
        dtype: of the hidden states; a GPU's weights are split for it.
        device: where everything lives.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = [KINDS[head * len(KINDS) // heads] for head in range(heads)]
    counts = [2 if kind in ("attention", "rolling_attention") else 1 for kind in kinds]
    order = sorted(range(heads), key=lambda head: (head % sites, head))
    first = dict(zip(order, np.cumsum([0] + [counts[head] for head in order]).tolist(), strict=False))
    weights = [torch.randn(width, count, generator=generator) / width**0.5 for count in counts]
    own = [[head for head in order if head % sites == site] for site in range(sites)]
    packed = [_site(torch.cat([weights[head] for head in members], 1), dtype, device) for members in own]
    probes = tuple(
        Probe(_lane(kind, head, first[head]), head % sites, weight.to(device))
        for head, (kind, weight) in enumerate(zip(kinds, weights, strict=True))
    )
    return Bank(probes, tuple(packed), LaneTable([probe.lane for probe in probes], heads, device), sum(counts))


def _site(weight: Tensor, dtype: torch.dtype, device: torch.device) -> Site:
    packed = pack_weight(weight).to(device)
    # Only tensor cores gain by halves.
    high, low = (packed, None) if device.type == "cpu" else split_weight(packed, dtype)
    empty = torch.empty(0, device=device)
    return high, torch.full((weight.shape[1],), 0.1, device=device), empty[:, None], empty, low


def _lane(kind: str, head: int, column: int) -> Lane:
    query = {"softmax": column, "attention": column + 1, "rolling_attention": column + 1}.get(kind, -1)
    return Lane(
        kind="attention" if kind == "softmax" else kind,
        head=head,
        value=column,
        query=query,
        param=_PARAM.get(kind, 1.0),
        window=_WINDOW.get(kind, 0),
    )


@dataclass(frozen=True, slots=True)
class Step:
    """The hidden states of one pass of a model, and whose rows they are."""

    hidden: tuple[Tensor, ...]
    """[T, D] of each site."""
    rows: FoldRows
    requests: int

    def refill(self, seed: int) -> None:
        """Replace the hidden states in place."""
        generator = torch.Generator(self.hidden[0].device).manual_seed(seed)
        for hidden_TD in self.hidden:
            hidden_TD.normal_(generator=generator)


def random_step(bank: Bank, rows: int, requests: int, dtype: torch.dtype, device: torch.device) -> Step:
    """Return one row of the response for every request, or else equal parts of so many prompts.

    Args:
        bank: says how many sites there are, and how wide.
        rows: T.
        requests: B, which divides T. The last row of each is watched.
        dtype: of the hidden states.
        device: where they live.
    """
    width, each = len(bank.sites[0][0]), rows // requests
    code = np.full(rows, RESPONSE if each == 1 else PROMPT)
    code[each - 1 :: each] |= WATCHED
    start = np.arange(requests + 1) * each
    step = Step(
        tuple(torch.empty(rows, width, dtype=dtype, device=device) for _ in bank.sites),
        FoldRows(np.arange(rows), code, start, np.arange(requests)),
        requests,
    )
    step.refill(0)
    return step

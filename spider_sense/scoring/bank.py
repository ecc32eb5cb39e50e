"""The bank: all probes of a guard, packed per site so that one product scores a site.

Every site owns a contiguous slice of the raw logits, filled with NaN before each step: a tap that did not run leaves
NaN behind, and NaN is a breach.

Shape letters: R rows of the buffer, T packed rows of a step, D width, C logit columns, H heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sense_kernels import Lane, LaneTable, score
from spider_sense.scoring.probe import Probe, SiteMap
from spider_sense.types import Site

__all__ = ["EPS", "Bank", "SitePack"]

EPS = 1e-6
"""Added to the mean square of a hidden state before its root."""


@dataclass(frozen=True, slots=True)
class SitePack:
    """The probes of one site as one matrix; linear columns first, then the hidden units of the MLP probes."""

    weight: Tensor  # [D, K + M]
    bias: Tensor  # [K + M]
    mlp_weight: Tensor  # [M, J], block diagonal
    mlp_bias: Tensor  # [J]

    @property
    def columns(self) -> int:
        """Raw logit columns that the site writes, K + J."""
        return self.weight.shape[1] - self.mlp_weight.shape[0] + self.mlp_weight.shape[1]


class Bank:
    """All probes, packed.

    Args:
        probes: at least one; their order is the order of the heads.
        device: where the weights live.
        rows: rows of the raw buffer to begin with; it grows.
    """

    def __init__(self, probes: Sequence[Probe], device: torch.device | str = "cpu", rows: int = 64) -> None:
        names = [probe.name for probe in probes]
        if len(set(names)) != len(names):
            # Columns go by name, and those of a second probe of the same name would stay 0.
            raise ValueError(f"probes need names of their own, got {', '.join(names)}")
        self.probes = tuple(probes)
        self.device = torch.device(device)
        self.sites = tuple(sorted({site for probe in probes for site in probe.maps}))
        first_column, lanes = 0, list[Lane]()
        self._column: dict[str, int] = {}
        for head, probe in enumerate(probes):
            self._column[probe.name] = first_column
            lanes.extend(probe.aggregator.lanes(head, first_column))
            first_column += probe.aggregator.columns
        self.columns = first_column
        """C, logit columns after summing over sites."""
        self.table = LaneTable(lanes, len(self.probes), self.device)
        self.packs: dict[Site, SitePack] = {}
        self._slices: dict[Site, slice] = {}
        targets: list[int] = []
        for site in self.sites:
            members = [probe for probe in probes if site in probe.maps]
            members.sort(key=lambda probe: probe.maps[site].mlp_weight is not None)
            self.packs[site] = _pack([probe.maps[site] for probe in members], self.device)
            start = len(targets)
            for probe in members:
                targets.extend(range(self._column[probe.name], self._column[probe.name] + probe.aggregator.columns))
            self._slices[site] = slice(start, len(targets))
        self._target = torch.tensor(targets, device=self.device)
        self._raw = torch.empty(rows, len(targets), device=self.device)

    def columns_of(self, probe: Probe) -> slice:
        """Return the logit columns of a probe."""
        start = self._column[probe.name]
        return slice(start, start + probe.aggregator.columns)

    def begin(self, rows: int) -> None:
        """Make room for a step of ``rows`` packed rows and mark every logit as not yet written."""
        if rows > self._raw.shape[0]:
            self._raw = torch.empty(2 * rows, self._raw.shape[1], device=self.device)
        self._raw[:rows].fill_(torch.nan)

    def tap(self, site: Site) -> Callable[[Tensor], None]:
        """Return the reader of a site: it scores hidden states [..., D], and may be compiled."""
        pack, columns = self.packs[site], self._slices[site]
        weight, bias, mlp_weight, mlp_bias = pack.weight, pack.bias, pack.mlp_weight, pack.mlp_bias

        def read(hidden: Tensor) -> None:
            score(hidden, weight, bias, mlp_weight, mlp_bias, EPS, self._raw[:, columns])

        return read

    def logits(self, rows: int) -> Tensor:
        """Return the step's logits [T, C]; NaN wherever a tap did not run."""
        logits_TC = torch.zeros(rows, self.columns, device=self.device)
        return logits_TC.index_add_(1, self._target, self._raw[:rows])


def _pack(maps: Sequence[SiteMap], device: torch.device) -> SitePack:
    seconds = [item.mlp_weight for item in maps if item.mlp_weight is not None]
    biases = [item.mlp_bias for item in maps if item.mlp_bias is not None]
    return SitePack(
        weight=torch.cat([item.weight for item in maps], 1).float().contiguous().to(device),
        bias=torch.cat([item.bias for item in maps]).float().to(device),
        mlp_weight=torch.block_diag(*seconds).float().to(device) if seconds else torch.empty(0, 0, device=device),
        mlp_bias=torch.cat(biases).float().to(device) if biases else torch.empty(0, device=device),
    )

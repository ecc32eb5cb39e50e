"""The bank: all probes of a guard, packed per site so that one product scores a site.

Every site owns a contiguous slice of the raw logits, filled with NaN before each step: a tap that did not run leaves
NaN behind, and NaN is a breach.

Shape letters: R rows of the buffer, T packed rows of a step, D width, C logit columns, H heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sense_kernels import (
    WARM_ROWS,
    FoldRows,
    HostSites,
    LaneTable,
    fold,
    new_scratch,
    pack_weight,
    score,
    split_weight,
)
from spider_sense.scoring.probe import Probe, SiteMap
from spider_sense.types import Site

__all__ = ["EPS", "Bank", "SitePack"]

EPS = 1e-6
"""Added to the mean square of a hidden state before its root."""


@dataclass(frozen=True, slots=True)
class SitePack:
    """The probes of one site as one matrix; linear columns first, then the hidden units of the MLP probes."""

    weight: Tensor  # [D, CP], K + M columns and zeros up to a multiple of 16; or its high half
    bias: Tensor  # [K + M]
    mlp_weight: Tensor  # [M, J], block diagonal
    mlp_bias: Tensor  # [J]
    weight_low: Tensor | None = None  # [D, CP], the low half where the weight is split

    @property
    def tensors(self) -> list[Tensor]:
        """All there are."""
        every = (self.weight, self.bias, self.mlp_weight, self.mlp_bias, self.weight_low)
        return [tensor for tensor in every if tensor is not None]

    @property
    def columns(self) -> int:
        """Raw logit columns that the site writes, K + J."""
        return len(self.bias) - self.mlp_weight.shape[0] + self.mlp_weight.shape[1]


class Bank:
    """All probes, packed.

    Args:
        probes: at least one; their order is the order of the heads.
        device: where the weights live.
        rows: rows of the raw buffer to begin with; it grows. A graph that is compiled once for all steps needs as
            many as the largest of them has.
        dtype: of the hidden states; on a GPU, weights for 16-bit ones are split in halves that its tensor cores take.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        device: torch.device | str = "cpu",
        rows: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        names = [probe.name for probe in probes]
        if len(set(names)) != len(names):
            # Columns go by name, and those of a second probe of the same name would stay 0.
            raise ValueError(f"probes need names of their own, got {', '.join(names)}")
        self.probes = tuple(probes)
        self.device, self._dtype = torch.device(device), dtype
        self.sites = tuple(sorted({site for probe in probes for site in probe.maps}))
        members = {site: _members(probes, site) for site in self.sites}
        split = dtype if self.device.type == "cuda" else torch.float32
        self.packs = {
            site: _pack([probe.maps[site] for probe in own], self.device, split) for site, own in members.items()
        }
        batched = _batched(self.packs) if self.device.type == "cpu" else []
        self._host = _host_sites([self.packs[site] for site in batched], dtype, rows)
        self._host_index = {site: index for index, site in enumerate(batched)}
        raw = self._place_raw(members)
        self._place_logits(raw)
        lanes = [
            lane
            for head, probe in enumerate(probes)
            for lane in probe.aggregator.lanes(head, self._columns[probe.name].start)
        ]
        self.table = LaneTable(lanes, len(self.probes), self.device)
        self._make_buffer(rows, sum(len(columns) for parts in raw.values() for columns in parts))
        self._scratch: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.device.type == "cuda":
            widths, columns = zip(*(pack.weight.shape for pack in self.packs.values()), strict=True)
            self._scratch = new_scratch(max(widths), max(columns), self.device)
            self._warm(dtype)

    def _place_raw(self, members: Mapping[Site, Sequence[Probe]]) -> dict[str, list[range]]:
        """Give every site its slice of the raw logits; return the raw columns of each probe, site by site."""
        self._slices: dict[Site, slice] = {}
        raw: dict[str, list[range]] = {probe.name: [] for probe in self.probes}
        end = 0
        for site in sorted(self.sites, key=lambda site: (site not in self._host_index, site)):
            start = end
            for probe in members[site]:
                raw[probe.name].append(range(end, end + probe.aggregator.columns))
                end += probe.aggregator.columns
            self._slices[site] = slice(start, end)
        return raw

    def _place_logits(self, raw: Mapping[str, Sequence[range]]) -> None:
        """Give every probe its logit columns; where all of them read one site, the raw columns as they stand."""
        order = sorted(self.probes, key=lambda probe: (len(raw[probe.name]), raw[probe.name][0].start))
        self._columns: dict[str, slice] = {}
        self.columns = 0
        """C, logit columns after summing over sites."""
        for probe in order:
            self._columns[probe.name] = slice(self.columns, self.columns + probe.aggregator.columns)
            self.columns += probe.aggregator.columns
        self._sums = [
            torch.tensor([column for probe in group for column in zip(*raw[probe.name], strict=True)]).to(self.device)
            for _, group in groupby(order, key=lambda probe: len(raw[probe.name]))
        ]

    def _warm(self, dtype: torch.dtype) -> None:
        """Compile every kernel variant, so that nothing is compiled while a graph is captured."""
        for rows in (1, WARM_ROWS):
            self.begin(rows)
            for site in self.sites:
                self.tap(site)(torch.zeros(rows, len(self.packs[site].weight), dtype=dtype, device=self.device))
        spare = self.table.new_state(1, self.device)
        nobody = FoldRows(np.array([0]), np.array([0]), np.array([0, 1]), np.array([-1]))
        fold(*spare, self.logits(1), nobody, self.table)

    def _make_buffer(self, rows: int, width: int) -> None:
        self._raw = torch.empty(rows, width, device=self.device)
        self._targets = {site: self._raw[:, columns] for site, columns in self._slices.items()}
        hosted = [self._targets[site] for site in self._host_index]
        self._host_targets = hosted, self._raw[:, : sum(target.shape[1] for target in hosted)]

    def columns_of(self, probe: Probe) -> slice:
        """Return the logit columns of a probe."""
        return self._columns[probe.name]

    @torch.inference_mode()
    def exchange(self, probes: Sequence[Probe]) -> None:
        """Take over other probes in place: taps that were traced or captured go on with their weights.

        Raises:
            ValueError: if their weights are not laid out as the bank's own; nothing is changed then.
        """
        fresh = Bank(probes, self.device, 1, self._dtype)
        if fresh._layout() != self._layout():
            raise ValueError("the probes write other columns than those they are to replace, or have other MLPs")
        for site, pack in self.packs.items():
            for mine, other in zip(pack.tensors, fresh.packs[site].tensors, strict=True):
                mine.copy_(other)
        if self._host is not None:
            self._host.refresh()
        self.probes, self.table = fresh.probes, fresh.table
        self._columns, self.columns, self._sums = fresh._columns, fresh.columns, fresh._sums

    def _layout(self) -> dict[Site, Any]:
        """Return what a compiled graph holds of each site: where it writes, and shapes of what it multiplies with."""
        return {
            site: (self._slices[site], [tensor.shape for tensor in pack.tensors]) for site, pack in self.packs.items()
        }

    def begin(self, rows: int) -> None:
        """Make room for a step of ``rows`` packed rows and mark every logit as not yet written."""
        if rows > self._raw.shape[0]:
            self._make_buffer(2 * rows, self._raw.shape[1])
        self._raw[:rows].fill_(torch.nan)
        if self._host is not None:
            self._host.drop()

    def tap(self, site: Site) -> Callable[..., None]:
        """Return the reader of a site: it scores hidden states [..., D], and may be compiled.

        Engines that keep a block's output and the residual stream apart give both; their sum is scored.
        """
        pack = self.packs[site]
        weight, bias, mlp_weight, mlp_bias = pack.weight, pack.bias, pack.mlp_weight, pack.mlp_bias
        index, width = self._host_index.get(site, -1), len(pack.weight)
        host = self._host if index >= 0 else None

        def read(hidden: Tensor, residual: Tensor | None = None) -> None:
            eager, size = not torch.compiler.is_compiling(), hidden.numel()
            if eager and size > len(self._raw) * width:
                # Nobody began this pass, which is one over a part of the model: there is nothing to judge.
                return
            if host and hidden.dtype == host.dtype and size <= (host.few if eager else host.rows) * width:
                host.put(index, hidden, residual)
            else:
                out, scratch = self._targets[site], self._scratch
                score(hidden, weight, bias, mlp_weight, mlp_bias, EPS, out, residual, pack.weight_low, *scratch)

        return read

    def logits(self, rows: int) -> Tensor:
        """Return the step's logits [T, C], valid until the next step begins; NaN wherever a tap did not run."""
        if self._host is not None:
            self._host.write(*self._host_targets)
        raw_TC = self._raw[:rows]
        if self.columns == raw_TC.shape[1]:
            return raw_TC
        # A gather and a sum, not index_add: its order of summation would vary from run to run on a GPU.
        return torch.cat([raw_TC[:, parts_CJ].sum(-1) for parts_CJ in self._sums], 1)


def _members(probes: Sequence[Probe], site: Site) -> list[Probe]:
    """Return the probes that read a site, those with an MLP last."""
    members = [probe for probe in probes if site in probe.maps]
    return sorted(members, key=lambda probe: probe.maps[site].mlp_weight is not None)


def _batched(packs: Mapping[Site, SitePack]) -> list[Site]:
    """Return the sites that the CPU scores together: without MLP probes and as wide as the first of them."""
    linear = [site for site, pack in packs.items() if not len(pack.mlp_weight)]
    return [site for site in linear if len(packs[site].weight) == len(packs[linear[0]].weight)]


def _host_sites(packs: Sequence[SitePack], dtype: torch.dtype, rows: int) -> HostSites | None:
    weights, biases = [pack.weight for pack in packs], [pack.bias for pack in packs]
    return HostSites(weights, biases, EPS, dtype, rows) if packs else None


def _pack(maps: Sequence[SiteMap], device: torch.device, dtype: torch.dtype) -> SitePack:
    seconds = [item.mlp_weight for item in maps if item.mlp_weight is not None]
    biases = [item.mlp_bias for item in maps if item.mlp_bias is not None]
    weight, low = split_weight(pack_weight(torch.cat([item.weight for item in maps], 1)), dtype)
    return SitePack(
        weight=weight.to(device),
        bias=torch.cat([item.bias for item in maps]).float().to(device),
        mlp_weight=torch.block_diag(*seconds).float().to(device) if seconds else torch.empty(0, 0, device=device),
        mlp_bias=torch.cat(biases).float().to(device) if biases else torch.empty(0, device=device),
        weight_low=None if low is None else low.to(device),
    )

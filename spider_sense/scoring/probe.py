"""Probes: maps from hidden states to token logits, with the aggregator that reads them.

A probe's weights expect hidden states divided by their root mean square, and carry everything else (standardisation,
gains) folded in.

Shape letters: D width, K logit columns of a probe, M hidden units of an MLP probe.
"""

from dataclasses import dataclass

from torch import Tensor

from spider_sense.scoring.aggregator import Aggregator
from spider_sense.types import Site

__all__ = ["Probe", "SiteMap"]


@dataclass(frozen=True, slots=True)
class SiteMap:
    """What a probe reads at one site: ``x / rms(x) @ weight + bias``, then optionally relu and a second matrix."""

    weight: Tensor  # [D, K], or [D, M] with an MLP
    bias: Tensor  # [K] or [M]
    mlp_weight: Tensor | None = None  # [M, K]
    mlp_bias: Tensor | None = None  # [K]

    @property
    def columns(self) -> int:
        """K."""
        return (self.weight if self.mlp_weight is None else self.mlp_weight).shape[1]


@dataclass(frozen=True, slots=True)
class Probe:
    """One trained probe.

    With several sites the logit columns of all of them are summed, which is a linear probe on the concatenated
    layers.
    """

    name: str
    """Name of the detector that it is."""
    family: str
    aggregator: Aggregator
    maps: dict[Site, SiteMap]

    def __post_init__(self) -> None:
        for site, site_map in self.maps.items():
            if site_map.columns != self.aggregator.columns:
                raise ValueError(
                    f"probe {self.name!r} has {site_map.columns} columns at {site}; "
                    f"its {self.aggregator.kind} aggregator reads {self.aggregator.columns}"
                )

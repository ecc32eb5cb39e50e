"""What tells two patches apart, row by row.

Shape letters: R rows that at least one of the patches changes, D inputs of the projection.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spider_sense.errors import ConfigError, MismatchError, PatchError
from spider_sense.folders import Record
from spider_sense.patch import KIND, NeuronPatch, PatchTarget
from spider_sense.types import Site

__all__ = ["PatchDiff", "SiteDiff", "are_patches", "diff_patches"]


class SiteDiff(Record):
    """Two patches at one projection."""

    site: str
    shared: int
    """Rows that both change."""
    only_a: int
    only_b: int
    norm_a: float
    """Frobenius norm of what the patch adds to the weight, at the strength that it is meant for."""
    norm_b: float
    cosine: float | None
    """Of the two deltas over the shared rows, all their numbers as one vector; None if no row is shared or one is 0."""


class PatchDiff(Record):
    """Two patches."""

    a: str
    """Digest."""
    b: str
    same_base: bool
    """Whether both were tuned for the same model."""
    sites: tuple[SiteDiff, ...]
    cosine: float | None
    """Of all that the two add to the model, as one vector, rows that only one changes counting as 0 in the other; None
    if one adds nothing."""


def are_patches(a: str, b: str) -> bool:
    """Tell whether two sources are patch folders; otherwise both are taken for models.

    Raises:
        ConfigError: if one is a patch and the other is not.
    """
    kinds = [(Path(source).expanduser() / KIND.manifest).is_file() for source in (a, b)]
    if kinds[0] != kinds[1]:
        patch, other = (a, b) if kinds[0] else (b, a)
        raise ConfigError(f"{patch} is a patch and {other} is none; compare two patches or two models")
    return kinds[0]


def diff_patches(a: NeuronPatch, b: NeuronPatch) -> PatchDiff:
    """Compare two patches.

    Raises:
        PatchError: if their vectors have different widths at a site; with both.
    """
    pairs = {site: _pair(site, a, b) for site in sorted({*a.targets, *b.targets})}
    return PatchDiff(
        a=a.digest,
        b=b.digest,
        same_base=_same_base(a, b),
        sites=tuple(_site_diff(site, pair) for site, pair in pairs.items()),
        cosine=_cosine([(pair.a_RD, pair.b_RD) for pair in pairs.values()]),
    )


class _Pair(NamedTuple):
    """What two patches do to the rows that at least one of them changes."""

    a_RD: Tensor
    b_RD: Tensor
    in_a_R: Tensor
    in_b_R: Tensor


def _pair(site: Site, a: NeuronPatch, b: NeuronPatch) -> _Pair:
    targets = a.targets.get(site), b.targets.get(site)
    widths = {target.vectors_KD.shape[1] for target in targets if target is not None}
    if len(widths) > 1:
        both = " and ".join(map(str, sorted(widths)))
        raise PatchError(f"the vectors for {site} have {both} numbers; compare patches of models of one width")
    neuron_R = torch.cat([target.neuron_R for target in targets if target is not None]).unique()
    (a_RD, in_a_R), (b_RD, in_b_R) = (
        _spread(target, patch.manifest.alpha, neuron_R, widths.copy().pop())
        for target, patch in zip(targets, (a, b), strict=True)
    )
    return _Pair(a_RD, b_RD, in_a_R, in_b_R)


def _spread(target: PatchTarget | None, alpha: float, neuron_R: Tensor, width: int) -> tuple[Tensor, Tensor]:
    delta_RD, changed_R = torch.zeros(len(neuron_R), width), torch.zeros(len(neuron_R), dtype=torch.bool)
    if target is not None:
        at = torch.searchsorted(neuron_R, target.neuron_R)
        delta_RD[at], changed_R[at] = alpha * target.delta_RD(), True
    return delta_RD, changed_R


def _site_diff(site: Site, pair: _Pair) -> SiteDiff:
    shared_R = pair.in_a_R & pair.in_b_R
    return SiteDiff(
        site=str(site),
        shared=int(shared_R.sum()),
        only_a=int((pair.in_a_R & ~shared_R).sum()),
        only_b=int((pair.in_b_R & ~shared_R).sum()),
        norm_a=float(pair.a_RD.norm()),
        norm_b=float(pair.b_RD.norm()),
        cosine=_cosine([(pair.a_RD[shared_R], pair.b_RD[shared_R])]),
    )


def _cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    product = sum(float((a * b).sum()) for a, b in pairs)
    length = math.prod(math.sqrt(sum(float(pair[side].square().sum()) for pair in pairs)) for side in (0, 1))
    return product / length if length else None


def _same_base(a: NeuronPatch, b: NeuronPatch) -> bool:
    try:
        a.check_model(b.manifest.base)
    except MismatchError:
        return False
    return True

"""Launch settings: everything a kernel's speed and its order of summation depend on, in one place.

Tiles and the split of the inner dimension come from the width, the number of columns, the dtype and the architecture
alone. The number of rows sets only the grid, so a row's logits do not depend on how many rows it was launched with.

Each launch is made on the device of its tensors; Triton by itself takes the current one.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sense_kernels._triton import INTERPRETED, triton
from sense_kernels.lanes import LANE_KINDS, lane_width

__all__ = [
    "PAD",
    "SPLIT_ROWS",
    "WARM_ROWS",
    "FoldLaunch",
    "MatchLaunch",
    "MatchScratch",
    "PatchLaunch",
    "ScoreLaunch",
    "Scratch",
    "backend",
    "fold_launch",
    "match_launch",
    "new_match_scratch",
    "new_scratch",
    "options",
    "padded",
    "patch_launch",
    "score_launch",
]

PAD = 16
"""Weight columns are padded to a multiple of this: whole tensor-core tiles, and loads of 16 bytes and more."""

SPLIT_ROWS = 2048
"""Up to so many rows the scoring kernel sums the segments of the width in parallel programs."""

WARM_ROWS = SPLIT_ROWS + 1
"""So many rows, and one, launch every variant of the scoring kernel."""

_CELLS = 32
_REGISTER_FLOATS = 16


def padded(columns: int) -> int:
    """Return the columns that a weight matrix of so many columns is stored with."""
    return -(-columns // PAD) * PAD


def options(warps: int, stages: int = 1) -> Mapping[str, Any]:
    """Return the compiler options of a launch."""
    return _options(warps, stages, backend())


@cache
def _options(warps: int, stages: int, target: str) -> Mapping[str, Any]:
    chosen = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if target == "cuda":
        # Left alone, ptxas trades a few spilled registers for one more resident program.
        chosen["maxnreg"] = 255
    return MappingProxyType(chosen)


def backend() -> str:
    """Return ``hip`` or ``cuda``, whatever kernels are compiled for; ``cuda`` in the interpreter."""
    return "cuda" if INTERPRETED else _backend_of(triton.runtime.driver.active)


@cache
def _backend_of(driver: Any) -> str:
    # Asking a driver takes longer than the rest of a launch.
    return str(driver.get_current_target().backend)


class ScoreLaunch(NamedTuple):
    """Tiles of the scoring kernel."""

    rows: int  # BT, rows of a tile
    inner: int  # BD, of the width, loaded at once
    columns: int  # BC, columns of a tile
    tiles: int  # column tiles, one after another in a program
    segment: int  # of the width; each segment is summed apart, then the segments in order
    segments: int
    warps: int
    stages: int
    split_rows: int  # up to so many rows the segments run in parallel programs
    precision: str  # input_precision of fp32 products


@cache
def score_launch(width: int, columns: int, half: bool, target: str = "cuda") -> ScoreLaunch:
    """Return the settings for [T, width] @ [width, columns].

    Args:
        width: D.
        columns: padded columns.
        half: whether the products are of 16-bit operands.
        target: ``cuda`` or ``hip``.
    """
    tile = min(128, _power_of_2(columns))
    # fp32 operands become three tf32 products in registers; on CUDA a wide tile's sums leave room for half as much.
    loaded = (64 if half else 32) // (2 if tile == 128 and target == "cuda" else 1)
    inner = min(loaded, _power_of_2(width))
    # Wavefronts are 64 wide there: with more of them a thread would load less than 16 bytes of a narrow tile.
    narrow = target == "hip" and tile == PAD
    segment = 512
    return ScoreLaunch(
        rows=64,
        inner=inner,
        columns=tile,
        tiles=-(-columns // tile),
        segment=segment,
        segments=-(-width // segment),
        warps=8 if tile >= 128 else 2 if narrow else 4,
        stages=2 if target == "hip" else 3,
        split_rows=SPLIT_ROWS,
        precision="ieee" if target == "hip" else "tf32x3",
    )


class Scratch(NamedTuple):
    """Working memory of the scoring kernel; one serves all sites of a stream."""

    partials: Tensor  # [segments, rows, CP + 16] float32, contents without meaning
    tickets: Tensor  # [row tiles] int32, zero between launches

    def holds(self, launch: ScoreLaunch, rows: int, columns: int) -> bool:
        """Return whether it is large enough for a launch."""
        segments, most_rows, stride = self.partials.shape
        enough = segments >= launch.segments and most_rows >= rows and stride > columns
        return enough and len(self.tickets) * launch.rows >= rows


def new_scratch(width: int, columns: int, device: torch.device | str) -> Scratch:
    """Return working memory for sites of up to ``width`` and so many columns."""
    launch = score_launch(width, padded(columns), True)
    return Scratch(
        torch.empty(launch.segments, launch.split_rows, padded(columns) + PAD, device=device),
        torch.zeros(-(-launch.split_rows // launch.rows), dtype=torch.int32, device=device),
    )


class FoldLaunch(NamedTuple):
    """Groups and programs of the fold kernel."""

    groups: tuple[tuple[int, ...], ...]  # each the GROUP of fold_cells
    requests: int  # of a program, in the group that has the fewest
    warps: int


@cache
def fold_launch(spec: tuple[int, ...]) -> FoldLaunch:
    """Return the settings for the groups of a lane table, described as in :attr:`LaneTable.spec`."""
    groups, requests, first, offset, largest = [], _CELLS, 0, 0, 1
    for kind, span, window, parts, lanes in zip(*[iter(spec)] * 5, strict=True):
        width = lane_width(LANE_KINDS[kind], window)
        heads = _power_of_2(lanes // parts)
        cells = max(_CELLS, heads)
        groups.append((kind, span, window, parts, lanes, first, offset, width, cells))
        requests = min(requests, cells // heads)
        ring = _power_of_2(window) if LANE_KINDS[kind].startswith("rolling") else 1
        largest = max(largest, cells * _power_of_2(parts) * ring)
        first, offset = first + lanes, offset + lanes * width
    return FoldLaunch(tuple(groups), requests, max(1, min(8, largest // (32 * _REGISTER_FLOATS))))


class PatchLaunch(NamedTuple):
    """Tiles of the patching kernels."""

    rows: int
    inner: int
    segment: int  # of the width; each segment is multiplied by a program of its own
    segments: int
    neurons: int  # patched neurons written at once
    warps: int
    stages: int
    precision: str


@cache
def patch_launch(width: int, target: str = "cuda") -> PatchLaunch:
    """Return the settings for vectors of a width."""
    # Each segment costs the update a load, so there are at most 32 of them.
    segment = min(max(256, _power_of_2(-(-width // 32))), _power_of_2(width))
    return PatchLaunch(
        rows=16,
        inner=min(64, _power_of_2(width)),
        segment=segment,
        segments=-(-width // segment),
        neurons=64,
        warps=2 if target == "hip" else 4,
        stages=2 if target == "hip" else 3,
        precision="ieee" if target == "hip" else "tf32x3",
    )


class MatchLaunch(NamedTuple):
    """Tiles of the signature search."""

    rows: int
    signatures: int  # of a block
    inner: int
    parts: int  # programs in all; they share the bank out among themselves
    warps: int
    stages: int


@cache
def match_launch(width: int, exact: bool) -> MatchLaunch:
    """Return the settings for queries of a width; ``exact`` queries need one product, others two."""
    # The two halves of a wider query are made in registers, which leaves room for half as many sums.
    return MatchLaunch(
        rows=64,
        signatures=128 if exact else 64,
        inner=min(64, _power_of_2(width)),
        parts=528,
        warps=8 if exact else 4,
        stages=3 if exact else 2,
    )


class MatchScratch(NamedTuple):
    """Working memory of the signature search."""

    best: Tensor  # float32, contents without meaning
    place: Tensor  # int64, contents without meaning
    tickets: Tensor  # [row tiles] int32, zero between launches


def new_match_scratch(rows: int, device: torch.device | str) -> MatchScratch:
    """Return working memory for up to so many queries."""
    launch = match_launch(64, True)
    size = max(rows, launch.parts * launch.rows)
    return MatchScratch(
        torch.empty(size, device=device),
        torch.empty(size, dtype=torch.int64, device=device),
        torch.zeros(-(-rows // launch.rows), dtype=torch.int32, device=device),
    )


def _power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()

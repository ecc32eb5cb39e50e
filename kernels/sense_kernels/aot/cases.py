"""The kernels and the variants of each that the gate compiles, as launches on tensors without memory.

A new kernel is one function that yields its cases, and one entry in :data:`KERNELS`.

Shape letters: T packed rows, D width, H logit columns, B requests.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import torch

from sense_kernels._patch_kernel import launch_dots, launch_update
from sense_kernels.aot.case import DTYPES, Case, empty, integers, mixed_bank
from sense_kernels.fold import fold_triton
from sense_kernels.launch import backend, patch_launch
from sense_kernels.roofline import fold_work, match_work, patch_dots_work, patch_update_work, score_work
from sense_kernels.rows import RowTensors
from sense_kernels.score import pack_weight, score_triton, split_weight
from sense_kernels.score_fold import Site
from sense_kernels.signatures import match_signatures_triton

__all__ = ["KERNELS"]

WIDTHS, COLUMNS, FLOATS = (576, 4096, 8192), (16, 64, 256), ("bf16", "fp16", "fp32")
FEW, MANY, HEADS, SIGNATURES, NEURONS, EPS = 32, 4096, 64, 65536, 256, 1e-6


@cache
def _site(width: int, columns: int, dtype: str, mlp: tuple[int, int] = (0, 0)) -> Site:
    units, outputs = mlp
    high, low = split_weight(pack_weight(torch.zeros(width, columns)), DTYPES[dtype])
    biases = empty(columns), empty(units, outputs), empty(outputs)
    return high.to("meta"), *biases, None if low is None else low.to("meta")


def _streams(dtype: str, residual: bool) -> tuple[str, ...]:
    return ("hidden", "weight", *["weight_low"] * (dtype != "fp32"), *["residual"] * residual)


def _score(rows: int, width: int, columns: int, dtype: str, residual: bool, mlp: tuple[int, int] = (0, 0)) -> Case:
    def launch() -> None:
        weight, bias, mlp_weight, mlp_bias, low = _site(width, columns, dtype, mlp)
        hidden, out = empty(rows, width, dtype=dtype), empty(rows, columns - mlp[0] + mlp[1])
        added = torch.empty_like(hidden) if residual else None
        score_triton(hidden, weight, bias, mlp_weight, mlp_bias, EPS, out, added, low)

    return Case(
        kernel="score",
        variant=("few rows" if rows == FEW else "many rows") + " residual" * residual + " MLP" * (mlp[0] > 0),
        dtype=dtype,
        width=width,
        columns=columns,
        rows=rows,
        launch=launch,
        work=lambda rows, backend: score_work(rows, width, columns, dtype, backend, residual, mlp),
        operands=dtype,
        streams=_streams(dtype, residual),
        decode=rows == FEW,
    )


def score_cases() -> Iterator[Case]:
    """Scoring alone: few rows (segments side by side) and many (one after another)."""
    for rows, width, columns, dtype in product((FEW, MANY), WIDTHS, COLUMNS, FLOATS):
        yield _score(rows, width, columns, dtype, residual=False)
        if width == 4096:
            yield _score(rows, width, columns, dtype, residual=True)
    for rows in (FEW, MANY):
        yield _score(rows, 4096, 96, "bf16", residual=False, mlp=(64, 4))


def _fold(
    variant: str, decode: bool = False, trace: bool = False, blocks: bool = False, accepted: bool = False
) -> Case:
    table = mixed_bank(HEADS)

    def launch() -> None:
        rows = RowTensors(
            row=None if decode else integers(4 * FEW),
            code=integers(4 * FEW),
            start=None if decode else integers(FEW + 1),
            slot=integers(FEW),
            accepted=integers(FEW) if accepted else None,
            block=integers(4 * FEW) if blocks else None,
        )
        fold_triton(
            *table.new_state(FEW, "meta"),
            empty(4 * FEW, HEADS),
            rows,
            table,
            empty(4 * FEW, HEADS) if trace else None,
            table.new_state(FEW, "meta") if blocks else None,
        )

    return Case(
        kernel="fold",
        variant=variant,
        dtype="fp32",
        width=None,
        columns=HEADS,
        rows=FEW,
        launch=launch,
        work=lambda rows, backend: fold_work(rows, rows, HEADS, table, trace),
        operands=None,
        streams=(),
    )


def fold_cases() -> Iterator[Case]:
    """The fold of a bank with every kind of lane."""
    yield _fold("plain")
    yield _fold("decode", decode=True)
    yield _fold("trace", trace=True)
    yield _fold("blocks", blocks=True)
    yield _fold("trace blocks accepted", trace=True, blocks=True, accepted=True)


def _patch_dots(width: int, clusters: int, dtype: str) -> Case:
    def launch() -> None:
        launch_dots(empty(FEW, width, dtype=dtype), empty(clusters, width), empty(FEW), patch_launch(width, backend()))

    return Case(
        kernel="patch_rows",
        variant="dots",
        dtype=dtype,
        width=width,
        columns=clusters,
        rows=FEW,
        launch=launch,
        work=lambda rows, backend: patch_dots_work(rows, width, clusters, dtype, backend),
        operands="fp32",
        streams=("hidden", "vectors"),
    )


def _patch_update(width: int, clusters: int, dtype: str) -> Case:
    def launch() -> None:
        tile = patch_launch(width, backend())
        partials, output = empty(tile.segments, FEW, clusters), empty(FEW, 4 * width, dtype=dtype)
        launch_update(output, partials, integers(NEURONS), integers(NEURONS), empty(FEW), 1.0, tile)

    return Case(
        kernel="patch_rows",
        variant="update",
        dtype=dtype,
        width=width,
        columns=clusters,
        rows=FEW,
        launch=launch,
        work=lambda rows, backend: patch_update_work(rows, NEURONS, dtype),
        operands=None,
        streams=(),
    )


def patch_cases() -> Iterator[Case]:
    """The two launches of the neuron patch; H is the number of clusters."""
    for width, clusters, dtype in product((576, 4096), (16, 64), FLOATS):
        yield _patch_dots(width, clusters, dtype)
        yield _patch_update(width, clusters, dtype)


def _match(width: int, dtype: str, stored: str) -> Case:
    def launch() -> None:
        scale = empty(SIGNATURES) if stored == "int8" else None
        bank, best, index = empty(SIGNATURES, width, dtype=stored), empty(FEW), integers(FEW)
        match_signatures_triton(empty(FEW, width, dtype=dtype), bank, scale, best, index)

    return Case(
        kernel="match_signatures",
        variant=f"{stored} bank",
        dtype=dtype,
        width=width,
        columns=SIGNATURES,
        rows=FEW,
        launch=launch,
        work=lambda rows, backend: match_work(rows, width, SIGNATURES, dtype, stored),
        operands="bf16",
        streams=("query", "signatures"),
    )


def match_cases() -> Iterator[Case]:
    """The signature search; H is the number of signatures."""
    for width, dtype, stored in product((576, 4096), ("bf16", "fp32"), ("bf16", "int8")):
        yield _match(width, dtype, stored)


KERNELS: dict[str, Callable[[], Iterator[Case]]] = {
    "score": score_cases,
    "fold": fold_cases,
    "patch_rows": patch_cases,
    "match_signatures": match_cases,
}
"""The cases of every kernel."""

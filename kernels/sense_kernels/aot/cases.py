"""The kernels and the variants of each that the gate compiles, as launches on tensors without memory.

A new kernel is one function that yields its cases, and one entry in :data:`KERNELS`.

Shape letters: T packed rows, D width, H logit columns, B requests.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import torch

from sense_kernels.aot.case import DTYPES, Case, empty, integers, mixed_bank
from sense_kernels.fold import fold_triton
from sense_kernels.patch import patch_rows_triton
from sense_kernels.roofline import Work, fold_work, match_work, patch_work, score_work
from sense_kernels.rows import RowTensors
from sense_kernels.score import pack_weight, score_triton, split_weight
from sense_kernels.score_fold import Site, score_fold_triton
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


def _score_fold(width: int, columns: int, dtype: str) -> Case:
    table = mixed_bank(min(columns, HEADS))

    def launch() -> None:
        hidden = empty(FEW, width, dtype=dtype)
        score_fold_triton(
            hidden,
            _site(width, columns, dtype),
            EPS,
            table.new_state(FEW, "meta"),
            RowTensors(row=None, code=integers(FEW), start=None, slot=integers(FEW)),
            table,
            empty(FEW, columns),
            torch.empty_like(hidden),
        )

    def work(rows: int, backend: str) -> Work:
        return score_work(rows, width, columns, dtype, backend, True) + fold_work(rows, rows, 0, table)

    return Case(
        kernel="score_fold",
        variant="decode residual",
        dtype=dtype,
        width=width,
        columns=columns,
        rows=FEW,
        launch=launch,
        work=work,
        operands=dtype,
        streams=_streams(dtype, residual=True),
    )


def score_fold_cases() -> Iterator[Case]:
    """The fused decode step. Its epilogue does not depend on the width, so two of three widths are tried once."""
    for columns, dtype in product(COLUMNS, FLOATS):
        yield _score_fold(4096, columns, dtype)
    for width in (576, 8192):
        yield _score_fold(width, 64, "bf16")


def _fold(trace: bool, blocks: bool, accepted: bool) -> Case:
    table = mixed_bank(HEADS)

    def launch() -> None:
        rows = RowTensors(
            row=integers(4 * FEW),
            code=integers(4 * FEW),
            start=integers(FEW + 1),
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
        variant=" ".join(n for n, on in {"trace": trace, "blocks": blocks, "accepted": accepted}.items() if on)
        or "plain",
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
    for trace, blocks, accepted in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1)):
        yield _fold(bool(trace), bool(blocks), bool(accepted))


def _patch(width: int, clusters: int, dtype: str) -> Case:
    def launch() -> None:
        output, hidden = empty(FEW, 4 * width, dtype=dtype), empty(FEW, width, dtype=dtype)
        vectors, gate = empty(clusters, width), empty(FEW)
        patch_rows_triton(output, hidden, vectors, integers(NEURONS), integers(NEURONS), gate, 1.0)

    return Case(
        kernel="patch_rows",
        variant="",
        dtype=dtype,
        width=width,
        columns=clusters,
        rows=FEW,
        launch=launch,
        work=lambda rows, backend: patch_work(rows, width, clusters, NEURONS, dtype, backend),
        operands="fp32",
        streams=("hidden", "vectors"),
    )


def patch_cases() -> Iterator[Case]:
    """The neuron patch; H is the number of clusters."""
    for width, clusters, dtype in product((576, 4096), (16, 64), FLOATS):
        yield _patch(width, clusters, dtype)


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
    "score_fold": score_fold_cases,
    "fold": fold_cases,
    "patch_rows": patch_cases,
    "match_signatures": match_cases,
}
"""The cases of every kernel."""

"""Command line of the gate: ``python -m sense_kernels.aot [--json] [--target sm_90] [--kernel score]``."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from sense_kernels._triton import INTERPRETED, triton
from sense_kernels.aot.cases import KERNELS
from sense_kernels.aot.gate import Row, row_of
from sense_kernels.aot.pool import Job, compile_all
from sense_kernels.aot.specialise import TARGETS, Specialisation, specialisations

_WIDTH = 200
_NUMBERS = (
    "warps",
    "regs",
    "spills",
    "scalar",
    "shared KiB",
    "load bits",
    "KiB",
    "MFLOP",
    "floor µs",
    "8B, 32",
    "70B, 32",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate and return the exit code: 0 passed, 1 failed, 2 if it cannot run."""
    options = _parser().parse_args(arguments)
    if reason := _obstacle():
        sys.stderr.write(f"error: {reason}\n")
        return 2
    started = time.monotonic()
    wanted = [
        (case, target)
        for target in options.target or TARGETS
        for cases in KERNELS.values()
        for case in cases()
        if not options.kernel or case.name.startswith(tuple(options.kernel))
    ]
    jobs = [_only(case.name, specialisations(case.launch, target), target) for case, target in wanted]
    compiled = compile_all(jobs, options.workers)
    rows = [row_of(case, target, compiled[job]) for (case, target), job in zip(wanted, jobs, strict=True)]
    failed = [f"{row.name} on {row.target}: {reason}" for row in rows for reason in row.failures]
    seconds = time.monotonic() - started
    if options.json:
        report = {
            "kernels": [asdict(row) for row in rows],
            "failed": failed,
            "compilations": len(compiled),
            "seconds": round(seconds, 1),
            "triton": triton.__version__,
        }
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        _show(rows, failed, len(compiled), seconds)
    return 1 if failed or not rows else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m sense_kernels.aot", description=sys.modules["sense_kernels.aot"].__doc__
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target; may be repeated")
    parser.add_argument("--kernel", action="append", help="only variants whose name begins so; may be repeated")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    return parser


def _obstacle() -> str:
    """Return why nothing can be compiled here, or an empty string."""
    if getattr(triton, "__name__", "") != "triton":
        return "the gate needs Triton, which is not installed here: pip install triton (Linux)"
    if INTERPRETED:
        return "TRITON_INTERPRET is set, so kernels are interpreted and nothing is compiled; unset it"
    return ""


def _only(name: str, found: list[Specialisation], target: str) -> Job:
    if len(found) != 1:
        raise ValueError(f"{name} launched {len(found)} kernels on {target}; a case is one launch")
    return found[0], target


def _show(rows: Sequence[Row], failed: Sequence[str], compilations: int, seconds: float) -> None:
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(title=f"Triton {triton.__version__}, compiled ahead of time")
    for name in ("variant", "target", "tensor core"):
        table.add_column(name)
    for name in _NUMBERS:
        table.add_column(name, justify="right")
    for row in rows:
        cells = tuple(_cells(row))
        if len(cells) != len(table.columns):
            raise AssertionError(f"{len(cells)} cells under {len(table.columns)} headings")
        table.add_row(*cells, style="red" if row.failures else None)
    console.print(table)
    for line in failed:
        console.print(f"failed: {line}", highlight=False, soft_wrap=True)
    console.print(f"{len(rows)} rows, {compilations} compilations, {len(failed)} failures, {seconds:.0f} s")


def _cells(row: Row) -> Iterator[str]:
    yield from (row.name, row.target, " ".join(row.tensor_core))
    yield from (
        str(row.warps),
        str(row.registers),
        str(row.spills),
        str(row.scalar_spills),
        f"{row.shared_bytes / 1024:.1f}",
    )
    yield str(min(row.stream_bits.values(), default=row.vector_bits))
    yield from (f"{row.bytes / 1024:.0f}", f"{row.flops / 1e6:.2f}", f"{min(row.roofline_us.values()):.3f}")
    for model in ("8B", "70B"):
        yield f"{row.share[model]['32']:.3%}" if model in row.share else ""


if __name__ == "__main__":
    sys.exit(main())

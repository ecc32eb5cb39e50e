"""One row for every variant and target: what was compiled, how fast it could be at best, and why it fails the gate."""

import re
from dataclasses import dataclass, field

from sense_kernels.aot.case import Case
from sense_kernels.aot.specialise import TARGETS, Compiled
from sense_kernels.roofline import MACHINES, MODELS, decode_step_us

__all__ = ["BATCHES", "Row", "failures", "row_of"]

BATCHES = (1, 32, 256)
"""Batch sizes of the decode steps that a kernel's share is given for."""

LOAD_BITS = 128
TENSOR_CORE_WIDTH = 256
TENSOR_MEMORY_COLUMNS = 512
"""Of one multiprocessor, from sm_100 on."""

_OPERANDS = {
    "bf16": re.compile(r"bf16|kind::f16"),
    "fp16": re.compile(r"[._]f16|kind::f16"),
    "fp32": re.compile(r"[.:]tf32|_x?f32$"),
}
"""How a tensor-core instruction names its operands; ``kind::f16`` of sm_100 stands for both 16-bit dtypes."""


@dataclass(kw_only=True)
class Row:
    """A variant on a target."""

    name: str
    kernel: str
    variant: str
    target: str
    dtype: str
    D: int | None
    H: int
    T: int
    operands: str | None = None
    """Dtype of what has to be multiplied on tensor cores."""
    error: str | None = None
    """Why it did not compile."""
    warps: int = 0
    registers: int = 0
    spills: int = 0
    """Bytes a thread keeps in memory for want of registers: stored or loaded, whichever is more."""
    scalar_spills: int = 0
    """AMD: scalar registers of a wave that are kept in lanes of vector registers. Reported, and no failure: nothing
    goes to memory, and the vector registers that it takes are counted in ``registers``."""
    shared_bytes: int = 0
    shared_limit: int = 0
    tensor_memory_columns: int = 0
    tensor_core: tuple[str, ...] = ()
    vector_bits: int = 0
    """Widest global load."""
    stream_bits: dict[str, int] = field(default_factory=dict)
    """Narrowest load of each tensor that has to be read 128 bits at a time; 0 if no load of it was found."""
    bytes: int = 0
    flops: int = 0
    roofline_us: dict[str, float] = field(default_factory=dict)
    """By machine, at T rows."""
    share: dict[str, dict[str, float]] = field(default_factory=dict)
    """By model and batch: the roofline time at as many rows over that of the whole decode step."""
    failures: list[str] = field(default_factory=list)


def row_of(case: Case, target: str, compiled: Compiled | str) -> Row:
    """Return the row of a case, its failures filled in.

    Args:
        case: the variant.
        target: a key of ``TARGETS``.
        compiled: what came out, or the compiler's message where nothing did.
    """
    backend, machine = TARGETS[target].backend, MACHINES[target]
    work = case.work(case.rows, backend)
    row = Row(
        name=case.name,
        kernel=case.kernel,
        variant=case.variant,
        target=target,
        dtype=case.dtype,
        D=case.width,
        H=case.columns,
        T=case.rows,
        operands=case.operands,
        shared_limit=TARGETS[target].shared_bytes,
        bytes=work.bytes,
        flops=work.flops,
        roofline_us={machine.name: work.floor_us(machine)},
        share=_shares(case, target),
    )
    if isinstance(compiled, str):
        row.error = compiled
    else:
        _fill(row, case, compiled)
    row.failures = failures(row)
    return row


def _fill(row: Row, case: Case, compiled: Compiled) -> None:
    usage, loads = compiled.usage, compiled.load_bits
    row.warps, row.registers, row.scalar_spills = compiled.warps, usage.registers, usage.scalar_spills
    row.spills = max(usage.spill_stores, usage.spill_loads)
    row.shared_bytes, row.tensor_memory_columns = compiled.shared_bytes, compiled.tensor_memory_columns
    row.tensor_core = compiled.tensor_core
    row.vector_bits = max((high for _, high in loads.values()), default=0)
    row.stream_bits = {name: loads.get(name, (0, 0))[0] for name in case.streams}


def _shares(case: Case, target: str) -> dict[str, dict[str, float]]:
    """Return nothing for a width that no model has."""
    if not case.decode:
        return {}
    backend, machine = TARGETS[target].backend, MACHINES[target]
    return {
        model.name: {
            str(batch): case.work(batch, backend).floor_us(machine) / decode_step_us(model, batch, machine)
            for batch in BATCHES
        }
        for model in MODELS
        if case.width in (None, model.width)
    }


def failures(row: Row) -> list[str]:
    """Return why a row fails the gate, in words; an empty list if it passes."""
    if row.error is not None:
        return [f"does not compile: {row.error}"]
    found = []
    if row.spills:
        found.append(f"spills {row.spills} bytes a thread")
    if row.shared_bytes > row.shared_limit:
        found.append(f"{row.shared_bytes} bytes of shared memory, {row.target} has {row.shared_limit}")
    if row.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        found.append(f"{row.tensor_memory_columns} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}")
    if _needs_tensor_core(row) and not any(_OPERANDS[str(row.operands)].search(name) for name in row.tensor_core):
        found.append(f"no tensor-core product of {row.operands} operands, found {', '.join(row.tensor_core) or 'none'}")
    narrow = {name: bits for name, bits in row.stream_bits.items() if bits < LOAD_BITS}
    found += [
        f"{name} is loaded {bits} bits at a time" if bits else f"no load of {name} found"
        for name, bits in narrow.items()
    ]
    return found


def _needs_tensor_core(row: Row) -> bool:
    """Exempt are kernels without products, and narrow ones."""
    return row.operands is not None and (row.D or 0) >= TENSOR_CORE_WIDTH

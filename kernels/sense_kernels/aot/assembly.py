"""Read what a compiled kernel uses: its assembly text, and for NVIDIA the disassembled binary.

Loads are told apart by the tensor they read: every instruction carries the source line it came from, and the line says
``tl.load(hidden + ...``.
"""

import linecache
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sense_kernels._triton import triton

__all__ = ["Usage", "amd_usage", "load_bits", "nvidia_usage", "tensor_cores"]


class Usage(NamedTuple):
    """Registers of a thread and what did not fit into them."""

    registers: int
    spill_stores: int  # bytes a thread
    spill_loads: int  # bytes a thread
    scalar_spills: int = 0  # AMD: scalar registers of a wave that were moved to vector registers


_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_TENSOR = re.compile(r"tl\.load\(\s*(\w+)")

_PTX_LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[busf](\d+)\b")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\b[^;]*?\],\s*(0x[0-9a-fA-F]+|\d+)")
_PTX_BULK = re.compile(r"\bcp\.async\.bulk\.(?:tensor|shared)")
_AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?[us]?(dword|byte|short)(?:_d16\w*)?(?:x(\d))?\b")
_AMD_WIDTH = {"dword": 32, "byte": 8, "short": 16}
_BULK_BITS = 128


def load_bits(assembly: str, source: Callable[[str, int], str] = linecache.getline) -> dict[str, tuple[int, int]]:
    """Return the narrowest and the widest global load of every tensor, in bits; "" for loads that name none.

    Args:
        assembly: PTX or AMD assembly with line information.
        source: returns a line of a source file, by path and number.
    """
    found: dict[str, tuple[int, int]] = {}
    for path, line, bits in _loads(assembly):
        key = _tensor(source(path, line), source(path, line + 1)) if path else ""
        low, high = found.get(key, (bits, bits))
        found[key] = min(low, bits), max(high, bits)
    return found


def _tensor(line: str, after: str) -> str:
    """Return the name that a ``tl.load`` which begins on a line reads from; it may stand on the line after it."""
    name = _TENSOR.search(line + after)
    return name[1] if name and name.start() < len(line) else ""


def _loads(assembly: str) -> Iterator[tuple[str, int, int]]:
    """Yield source path, source line and width in bits of every global load."""
    files = {number: str(Path(first, second)) for number, first, second in _FILE.findall(assembly)}
    path, line = "", 0
    for text in assembly.splitlines():
        if place := _LOC.search(text):
            path, line = files.get(place[1], ""), int(place[2])
        elif bits := _width(text):
            yield path, line, bits


def _width(instruction: str) -> int:
    if found := _PTX_LOAD.search(instruction):
        return int(found[1] or 1) * int(found[2])
    if found := _PTX_COPY.search(instruction):
        return 8 * int(found[1], 0)
    if _PTX_BULK.search(instruction):
        return _BULK_BITS
    if found := _AMD_LOAD.search(instruction):
        return _AMD_WIDTH[found[1]] * int(found[2] or 1)
    return 0


_MMA = re.compile(r"\bmma\.sync\.aligned\.(m\d+n\d+k\d+)\.row\.col\.\w+\.(\w+)")
_WGMMA = re.compile(r"\bwgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)\.\w+\.(\w+)")
_TCGEN = re.compile(r"\btcgen05\.mma\.cta_group::\d\.(kind::\w+)")
_MFMA = re.compile(r"\b(v_mfma_\w+)")


def tensor_cores(assembly: str) -> tuple[str, ...]:
    """Return the kinds of tensor-core instructions, sorted: ``mma.sync.m16n8k16.bf16`` and the like."""
    found = {f"mma.sync.{shape}.{kind}" for shape, kind in _MMA.findall(assembly)}
    found |= {f"wgmma.{shape}.{kind}" for shape, kind in _WGMMA.findall(assembly)}
    found |= {f"tcgen05.mma.{kind}" for kind in _TCGEN.findall(assembly)}
    return tuple(sorted(found | set(_MFMA.findall(assembly))))


_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_LOCAL = re.compile(r"\b(STL|LDL)((?:\.[A-Z0-9]+)*)")


def nvidia_usage(cubin: bytes) -> Usage:
    """Return what a cubin uses. A thread's stack holds nothing but spills, so without one there are none."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _RESOURCES.search(_cuobjdump("--dump-resource-usage", file.name))
        if resources is None:
            raise ValueError("cuobjdump names no registers; is it older than the cubin's architecture?")
        registers, stack = int(resources[1]), int(resources[2])
        stores, loads = local_bytes(_cuobjdump("--dump-sass", file.name)) if stack else (0, 0)
    return Usage(registers, stores, loads)


def local_bytes(sass: str) -> tuple[int, int]:
    """Return the bytes that a thread's instructions store to and load from its stack, each instruction once."""
    total = {"STL": 0, "LDL": 0}
    for name, modifiers in _LOCAL.findall(sass):
        width = re.search(r"\.(8|16|64|128)$|\.[US](8|16)\b", modifiers)
        total[name] += int(width[1] or width[2]) // 8 if width else 4
    return total["STL"], total["LDL"]


def _cuobjdump(option: str, path: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout


def amd_usage(assembly: str) -> Usage:
    """Return what the metadata of AMD assembly says. Spilled vector registers take 4 bytes a thread."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found[1])

    spilled = max(4 * field("vgpr_spill_count"), field("private_segment_fixed_size"))
    return Usage(field("vgpr_count"), spilled, spilled, field("sgpr_spill_count"))

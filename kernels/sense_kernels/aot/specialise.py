"""Find out what a launch function would compile for a target, and compile it, without that target's hardware.

The launch functions are run as they are, on tensors of device ``meta``: shapes, strides and dtypes without memory.
Their address is 0, a multiple of 16 as that of every allocation is. Triton derives the specialisation from them as it
does from real tensors, and hands it to a hook before it would compile and launch.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sense_kernels._triton import triton
from sense_kernels.aot.assembly import Usage, amd_usage, load_bits, nvidia_usage, tensor_cores

__all__ = ["TARGETS", "Compiled", "Specialisation", "Target", "compile_specialisation", "specialisations"]


class Target(NamedTuple):
    """What kernels are compiled for, and the limits of one program."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}
"""Shared memory: table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide, and the LDS
of the CDNA 3 instruction set architecture guide."""


class Specialisation(NamedTuple):
    """One compilation: a kernel, and all that its code depends on, as Triton writes it down."""

    module: str
    kernel: str
    data: str


class Compiled(NamedTuple):
    """What came out of a compilation."""

    usage: Usage
    warps: int
    shared_bytes: int
    tensor_memory_columns: int
    tensor_core: tuple[str, ...]
    load_bits: dict[str, tuple[int, int]]
    """Narrowest and widest load of every tensor."""


class _Driver:
    """As much of a driver as specialising needs.

    Triton keeps what it compiled by device number. Each target has two: launches are run on one where nothing is ever
    compiled, so that none of them finds a kernel and starts it.
    """

    def __init__(self, name: str, launches: bool) -> None:
        target = TARGETS[name]
        self._target = triton.backends.compiler.GPUTarget(target.backend, target.arch, target.warp_size)
        self._device = 2 * list(TARGETS).index(name) + launches

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _active(target: str, launches: bool) -> Iterator[None]:
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(target, launches))
    try:
        yield
    finally:
        config.set_active(before)


def specialisations(launch: Callable[[], None], target: str) -> list[Specialisation]:
    """Run a launch function and return what it would compile for a target; nothing is compiled or launched."""
    found: list[Specialisation] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # noqa: A002
        kernel = fn.jit_function.fn
        found.append(Specialisation(kernel.__module__, kernel.__qualname__, compile["specialization_data"]))
        return True  # compiled elsewhere: Triton then launches nothing

    knobs = triton.knobs.runtime
    before, knobs.jit_cache_hook = knobs.jit_cache_hook, hook
    try:
        with _active(target, launches=True):
            launch()
    finally:
        knobs.jit_cache_hook = before
    return found


def compile_specialisation(specialisation: Specialisation, target: str) -> Compiled:
    """Compile, or take from Triton's cache, and read off the binary what the kernel uses."""
    kernel = getattr(importlib.import_module(specialisation.module), specialisation.kernel)
    with _active(target, launches=False):
        compiled = kernel.preload(specialisation.data)
    assembly = compiled.asm["amdgcn" if TARGETS[target].backend == "hip" else "ptx"]
    usage = amd_usage(assembly) if TARGETS[target].backend == "hip" else nvidia_usage(compiled.asm["cubin"])
    return Compiled(
        usage,
        compiled.metadata.num_warps,
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_cores(assembly),
        load_bits(assembly),
    )

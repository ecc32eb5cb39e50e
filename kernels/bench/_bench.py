"""What the benchmarks share: a gate, and variants timed in turn.

Variants are called one after another, round after round, forwards and then backwards, so that a machine that slows down
slows them all. On a CPU each timed call follows one of the same variant that is not timed, and so meets its own data in
the cache; on a GPU the second-level cache is overwritten first.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "Call", "alternate", "check", "compiled", "graph_of", "numbers", "options"]

Call = Callable[[], object]

TOLERANCE = 1e-4
"""Greatest relative or absolute difference between results in fp32."""
WARM_UP = 3
_FLUSH_BYTES = 256 << 20


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each variant (default: 30)")
    parser.add_argument("--quick", action="store_true", help="5 rounds: whether it runs, not how fast")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("results.csv"), help="rows are appended")
    return parser


def numbers(text: str) -> list[int]:
    """Read comma-separated numbers."""
    return [int(part) for part in text.split(",")]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for fixed shapes, afresh: graphs of earlier cases would count towards dynamo's limit."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def graph_of(call: Call) -> Call:
    """Capture a call as a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def check(variant: str, got: Sequence[Tensor], ours: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    """Compare a variant's results with ours.

    Args:
        variant: its name, for the message.
        got: its results.
        ours: as many.
        tolerance: greatest relative or absolute difference.

    Raises:
        AssertionError: if they differ by more, or if either holds NaN.
    """
    for position, (result, own) in enumerate(zip(got, ours, strict=True)):
        try:
            torch.testing.assert_close(result, own, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            raise AssertionError(f"{variant} does not agree in result {position}: {error}") from None


def alternate(variants: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the microseconds of each call of each variant."""
    clock = _device_clock(device) if device.type == "cuda" else _host_clock
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(WARM_UP + rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            taken = clock(variants[name])
            if number >= WARM_UP:
                times[name].append(taken)
    return times


def _host_clock(call: Call) -> float:
    call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _device_clock(device: torch.device) -> Callable[[Call], float]:
    size = max(_FLUSH_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    flush = torch.empty(size, dtype=torch.uint8, device=device)

    def clock(call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return clock

"""One variant of a kernel, and what its launch needs: tensors without memory and a bank with every kind of lane."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sense_kernels.lane_table import LaneTable
from sense_kernels.lanes import Lane, LaneKind
from sense_kernels.roofline import Work

__all__ = ["DTYPES", "Case", "empty", "integers", "mixed_bank"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One variant of a kernel."""

    kernel: str
    variant: str
    dtype: str
    """Of the hidden states."""
    width: int | None
    """D; None where there is none."""
    columns: int
    """H, or what the kernel has instead: clusters, signatures."""
    rows: int
    """T that the figures are for."""
    launch: Callable[[], None]
    """Calls the kernel's launch function."""
    work: Callable[[int, str], Work]
    """Counts what a launch of T rows does, compiled for a backend."""
    operands: str | None
    """Dtype of what is multiplied on tensor cores; None for a kernel without products."""
    streams: tuple[str, ...]
    """Tensors of the kernel, as its ``tl.load`` names them, that must be read 128 bits at a time."""
    decode: bool = True
    """Whether it runs in every decode step, so that it has a share of one."""

    @property
    def name(self) -> str:
        """Kernel, variant, dtype and sizes."""
        width = "" if self.width is None else f" D{self.width}"
        return " ".join(f"{self.kernel} {self.variant} {self.dtype}{width} H{self.columns}".split())


def empty(*shape: int, dtype: str = "fp32") -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def integers(*shape: int) -> Tensor:
    """Return an int64 tensor without memory."""
    return torch.empty(shape, dtype=torch.int64, device="meta")


_KINDS: tuple[tuple[LaneKind, int, int], ...] = (
    ("mean", 0, 1),
    ("max", 0, 1),
    ("ema_max", 10, 1),
    ("attention", 0, 1),
    ("attention", 0, 3),
    ("cusum", 0, 1),
    ("rolling_mean_max", 16, 1),
    ("rolling_attention", 10, 1),
)
"""Kind, window and lanes of a head, in turn."""


def mixed_bank(heads: int) -> LaneTable:
    """Return a bank of all kinds mixed; head h reads the columns from h on."""
    lanes = []
    for head in range(heads):
        kind, window, parts = _KINDS[head % len(_KINDS)]
        for part in range(parts):
            query = (head + part + 1) % heads if kind.endswith("attention") else -1
            value = (head + part) % heads
            lanes.append(Lane(kind=kind, head=head, value=value, query=query, window=window, param=0.1))
    return LaneTable(lanes, heads, device="meta")

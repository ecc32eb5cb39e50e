"""Floors under a kernel's time: bytes over memory bandwidth, or flops over peak, and their share of a decode step.

Counted, not measured. A floor leaves out what a launch costs (a few microseconds, or next to nothing inside a captured
graph), and it takes what lies in the second-level cache between two programs of one kernel as free.

Shape letters: T packed rows, D width, C logit columns, B requests, K linear columns, M hidden units, J their columns.
"""

from dataclasses import dataclass
from typing import NamedTuple

from sense_kernels.lane_table import LaneTable
from sense_kernels.lanes import LANE_KINDS
from sense_kernels.launch import padded

__all__ = [
    "ITEM_BYTES",
    "MACHINES",
    "MODELS",
    "Machine",
    "Model",
    "Work",
    "decode_step_us",
    "fold_work",
    "match_work",
    "patch_dots_work",
    "patch_update_work",
    "score_work",
]

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1}


class Machine(NamedTuple):
    """A GPU's memory bandwidth and dense peaks, in GB/s and TFLOP/s."""

    name: str
    bandwidth: float
    half: float  # bf16 and fp16 tensor cores
    single: float  # tensor cores, on what fp32 products are made of: tf32, or fp32 where it exists
    vector: float  # fp32 without tensor cores


MACHINES = {
    "sm_80": Machine("A100 SXM 80 GB", 2039, 312, 156, 19.5),
    "sm_90": Machine("H100 SXM", 3350, 989.4, 494.7, 66.9),
    "sm_100": Machine("B200", 8000, 2250, 1100, 80),
    "gfx942": Machine("MI300X", 5300, 1307.4, 163.4, 163.4),
}
"""For each target the machine whose floor is given.

Sources: NVIDIA A100 80GB data sheet (SXM column); NVIDIA H100 data sheet (SXM column, half of the figures with
sparsity); NVIDIA Blackwell architecture technical brief (HGX B200, dense); AMD Instinct MI300X data sheet (fp32 matrix
peak for ``single``, since the kernels use no xf32)."""


class Model(NamedTuple):
    """A language model as the decode-step model sees it."""

    name: str
    parameters: float
    width: int


MODELS = (Model("8B", 8.03e9, 4096), Model("70B", 70.6e9, 8192))
"""Llama 3.1 8B and 70B (arXiv 2407.21783, table 3; parameters as the model cards count them)."""


def decode_step_us(model: Model, batch: int, machine: Machine) -> float:
    """Return the floor under one decode step of a batch, in microseconds.

    The weights in bf16 are read once and every parameter costs two flops a token; whichever of the two takes longer is
    the step: no KV cache, attention, launch or communication. A real step takes longer, and so does a real kernel; a
    share compares floor with floor. 70B does not fit one of these GPUs with 80 GB: its step is given as if it did.
    Sharding over n GPUs divides the step by n, and a kernel's time by n only where the probes are sharded too.
    """
    memory = 2.0 * model.parameters / machine.bandwidth / 1e3
    return max(memory, 2.0 * model.parameters * batch / machine.half / 1e6)


@dataclass(frozen=True, slots=True)
class Work:
    """What one launch moves and computes."""

    bytes: int
    half: int = 0  # tensor-core flops of 16-bit operands
    single: int = 0  # tensor-core flops of tf32 or fp32 operands
    vector: int = 0  # other flops

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.bytes + other.bytes, self.half + other.half, self.single + other.single, self.vector + other.vector
        )

    @property
    def flops(self) -> int:
        """All of them."""
        return self.half + self.single + self.vector

    def floor_us(self, machine: Machine) -> float:
        """Return the roofline time in microseconds."""
        compute = self.half / machine.half + self.single / machine.single + self.vector / machine.vector
        return max(self.bytes / machine.bandwidth / 1e3, compute / 1e6)


def _fp32_products(backend: str) -> int:
    """Tensor-core products that one fp32 product takes: tf32x3 on NVIDIA, fp32 on AMD."""
    return 1 if backend == "hip" else 3


def score_work(
    rows: int, width: int, columns: int, dtype: str, backend: str, residual: bool = False, mlp: tuple[int, int] = (0, 0)
) -> Work:
    """Count scoring: hidden states and residual once, weights once, logits out.

    Args:
        rows: T.
        width: D.
        columns: K + M, linear columns with the hidden units of MLP probes.
        dtype: of the hidden states; 16-bit ones are multiplied with both halves of the weight.
        backend: ``cuda`` or ``hip``.
        residual: whether there is one.
        mlp: (M, J), hidden units and their columns.
    """
    units, outputs = mlp
    item, stored = ITEM_BYTES[dtype], padded(columns)
    moved = rows * width * item * (1 + residual) + 4 * width * stored
    moved += 4 * (columns + units * outputs + outputs) + 4 * rows * (columns - units + outputs)
    products = 2 * rows * width * stored
    single = 2 * rows * units * outputs * _fp32_products(backend)
    if dtype == "fp32":
        return Work(moved, single=products * _fp32_products(backend) + single, vector=2 * rows * width)
    return Work(moved, half=2 * products, single=single, vector=2 * rows * width)


_LANE_FLOPS = {"mean": 3, "max": 1, "ema_max": 5, "attention": 9, "cusum": 4}
_WINDOW_FLOPS = {"rolling_mean_max": 1, "rolling_attention": 6}


def fold_work(requests: int, rows: int, columns: int, table: LaneTable, trace: bool = False) -> Work:
    """Count the fold: state in and out, logits in, a few flops a lane and token (an exponential counts as one).

    Args:
        requests: B, each with one state.
        rows: R, folded tokens of all requests.
        columns: C logit columns to read.
        table: the lanes.
        trace: whether the readouts are written.
    """
    state = requests * (4 * table.state_floats + 8 * len(table.groups) + 4 * table.heads)
    moved = 2 * state + 28 * len(table.value) + 24 * rows + 4 * rows * columns + 4 * rows * table.heads * trace
    flops = 0
    for kind, _, window, _, lanes in zip(*[iter(table.spec)] * 5, strict=True):
        name = LANE_KINDS[kind]
        flops += lanes * (_LANE_FLOPS.get(name, 2) + _WINDOW_FLOPS.get(name, 0) * window)
    return Work(moved, vector=rows * flops)


def patch_dots_work(rows: int, width: int, clusters: int, dtype: str, backend: str) -> Work:
    """Count the dot products of a neuron patch with every row's gate open: hidden states and vectors once.

    The partial sums, which stay in a cache, are counted neither here nor in :func:`patch_update_work`.
    """
    moved = rows * width * ITEM_BYTES[dtype] + 4 * clusters * width + 4 * rows
    return Work(moved, single=2 * rows * width * max(16, clusters) * _fp32_products(backend))


def patch_update_work(rows: int, neurons: int, dtype: str) -> Work:
    """Count the update of a neuron patch with every row's gate open: patched outputs in and out."""
    return Work(16 * neurons + 2 * rows * neurons * ITEM_BYTES[dtype] + 4 * rows, vector=2 * rows * neurons)


def match_work(rows: int, width: int, signatures: int, dtype: str, stored: str) -> Work:
    """Count the signature search: the bank once, queries once, the best of each query out.

    Args:
        rows: T queries.
        width: D.
        signatures: N.
        dtype: of the queries; any but bf16 is multiplied as two bf16 halves.
        stored: ``bf16``, or ``int8`` with one scale a signature.
    """
    moved = signatures * (width * ITEM_BYTES[stored] + 4 * (stored == "int8")) + rows * (width * ITEM_BYTES[dtype] + 12)
    return Work(moved, half=2 * rows * width * signatures * (1 if dtype == "bf16" else 2), vector=2 * rows * width)

"""Patch 70 neurons of an MLP's projection for some rows of a batch: the kernel against a dense product with the delta.

    python kernels/bench/bench_patch_rows.py

``dense`` multiplies with the whole difference of the weights, as an adapter would; ``loop`` patches one cluster after
another. Each variant adds to an output of its own, call after call.

Shape letters: T packed rows, D inputs of the projection, F its outputs, K clusters, R patched neurons.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from _bench import TOLERANCE, Call, alternate, check, compiled, graph_of, numbers, options
from _report import Case, Report, report
from torch import Tensor

from sense_kernels import patch_rows, patch_rows_torch

__all__ = ["Work", "main", "parse", "random_work", "run_case", "variants"]

ALPHA = 0.5
_HALF_TOLERANCE = 0.03
"""Greatest difference between 16-bit outputs: ``dense`` rounds the delta and its product, the kernel neither."""


@dataclass(frozen=True, slots=True)
class Work:
    """The arguments of ``sense_kernels.patch_rows`` except the output, and the output's shape and dtype."""

    hidden_TD: Tensor
    vectors_KD: Tensor
    neuron_R: Tensor
    cluster_R: Tensor
    gate_T: Tensor
    output_TF: Tensor
    """What every variant starts from."""


def random_work(
    shape: tuple[int, int, int], clusters: int, neurons: int, gated: int, dtype: torch.dtype, device: torch.device
) -> Work:
    """Return a patch spread over the neurons, for the first ``gated`` rows of T. ``shape`` is (T, D, F)."""
    rows, width, features = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return Work(
        normal(rows, width).to(device, dtype),
        (normal(clusters, width) / width**0.5).to(device),
        torch.randperm(features, generator=generator)[:neurons].sort().values.to(device),
        torch.arange(neurons, device=device) % clusters,
        (torch.arange(rows, device=device) < gated).float(),
        normal(rows, features).to(device, dtype),
    )


def variants(work: Work, compiler: Any = compiled) -> dict[str, tuple[Call, Tensor]]:
    """Return each variant's call, and the output [T, F] that it adds to."""
    hidden, vectors, gate_T1 = work.hidden_TD, work.vectors_KD, work.gate_T[:, None] * ALPHA
    patch = hidden, vectors, work.neuron_R, work.cluster_R, work.gate_T, ALPHA
    delta_FD = torch.zeros(work.output_TF.shape[1], vectors.shape[1], device=vectors.device)
    delta_FD[work.neuron_R] = vectors[work.cluster_R]
    delta_DF = delta_FD.to(hidden.dtype).T
    members = [work.neuron_R[work.cluster_R == cluster] for cluster in range(len(vectors))]
    out = {name: work.output_TF.clone() for name in ("ours", "eager", "compiled", "dense", "loop")}
    twin = compiler(patch_rows_torch)

    def dense() -> None:
        out["dense"].add_((hidden @ delta_DF) * gate_T1.to(hidden.dtype))

    def loop() -> None:
        x_TD = hidden.float()
        for vector_D, neurons in zip(vectors, members, strict=True):
            out["loop"][:, neurons] += (gate_T1 * (x_TD @ vector_D)[:, None]).to(hidden.dtype)

    calls: dict[str, Call] = {
        "ours": lambda: patch_rows(out["ours"], *patch),
        "eager": lambda: patch_rows_torch(out["eager"], *patch),
        "compiled": lambda: twin(out["compiled"], *patch),
        "dense": dense,
        "loop": loop,
    }
    return {name: (call, out[name]) for name, call in calls.items()}


def run_case(name: str, work: Work, out: Report, compiler: Any = compiled) -> None:
    """Compare the variants' first results, then time them; on a GPU a second time as CUDA graphs."""
    made = variants(work, compiler)
    tolerance = TOLERANCE if work.output_TF.dtype == torch.float32 else _HALF_TOLERANCE
    for variant, (call, output_TF) in made.items():
        call()
        check(variant, [output_TF], [made["ours"][1]], tolerance)
    calls = {variant: call for variant, (call, _) in made.items()}
    (rows, width), count = work.hidden_TD.shape, len(work.neuron_R)
    size = work.hidden_TD.element_size()
    moved = int(work.gate_T.count_nonzero()) * size * (width + 2 * count) + work.vectors_KD.nbytes + work.gate_T.nbytes
    dtype = str(work.hidden_TD.dtype).removeprefix("torch.")
    out.add(Case(name, rows, width, count, dtype, moved), alternate(calls, out.rounds, out.device))
    if out.device.type == "cuda":
        captured = {variant: graph_of(call) for variant, call in calls.items()}
        case = Case(f"{name}_graph", rows, width, count, dtype, moved)
        out.add(case, alternate(captured, out.rounds, out.device))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = options("Patch neurons of a projection for some rows, against torch.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--decode", type=numbers, default=[8], help="rows of a decode step, 2 of them patched")
    parser.add_argument("--prefill", type=numbers, default=[2048], help="rows of a prefill, all patched")
    parser.add_argument("--clusters", type=numbers, default=[1, 3], help="comma-separated, like the rows")
    parser.add_argument("--neurons", type=int, default=70)
    parser.add_argument("--width", type=int, default=4096 if cuda else 576)
    parser.add_argument("--features", type=int, default=14336 if cuda else 1536)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of hidden states and outputs")
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all cases; return the JSON line."""
    with report("patch_rows", arguments) as out:
        for kind, lengths in (("decode", arguments.decode), ("prefill", arguments.prefill)):
            for rows, clusters in product(lengths, arguments.clusters):
                shape = rows, arguments.width, arguments.features
                gated = 2 if kind == "decode" else rows
                dtype = getattr(torch, arguments.dtype)
                work = random_work(shape, clusters, arguments.neurons, gated, dtype, out.device)
                run_case(f"{kind}{rows}_k{clusters}", work, out)
    return out.line


if __name__ == "__main__":
    main(parse())

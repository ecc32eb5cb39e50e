"""Find the nearest of many signatures: the kernel against the whole matrix of cosines.

    python kernels/bench/bench_match_signatures.py --large

``full`` is the twin: all cosines, then their maximum; ``loop`` takes one query after another. The bank is stored in 16
or 8 bits, and every variant converts it itself, for a copy in fp32 would take two to four times its memory.

Shape letters: T queries, N signatures, D width.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from _bench import Call, alternate, check, compiled, graph_of, numbers, options
from _report import Case, Report, report
from torch import Tensor

from sense_kernels import match_signatures, match_signatures_torch, new_match_scratch, quantise_signatures

__all__ = ["main", "parse", "random_bank", "run_case", "variants"]

Bank = tuple[Tensor, Tensor | None]
"""Signatures [N, D], and the scale [N] of int8 ones or None."""


def random_bank(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Bank:
    """Return unit vectors of a dtype: bfloat16 or int8."""
    generator = torch.Generator(device).manual_seed(0)
    unit_ND = torch.nn.functional.normalize(torch.randn(count, width, generator=generator, device=device))
    return quantise_signatures(unit_ND) if dtype == torch.int8 else (unit_ND.to(dtype), None)


def variants(query_TD: Tensor, bank: Bank, compiler: Any = compiled) -> dict[str, tuple[Call, tuple[Tensor, Tensor]]]:
    """Return each variant's call, and the cosines [T] and indices [T] that it writes."""
    names = "ours", "full", "compiled", "loop"
    out = {
        name: (query_TD.new_empty(len(query_TD), dtype=torch.float32), query_TD.new_empty(len(query_TD)).long())
        for name in names
    }
    scratch = new_match_scratch(len(query_TD), query_TD.device) if query_TD.is_cuda else ()
    twin = compiler(match_signatures_torch)
    calls: dict[str, Call] = {
        "ours": lambda: match_signatures(query_TD, *bank, *out["ours"], *scratch),
        "full": lambda: match_signatures_torch(query_TD, *bank, *out["full"]),
        "compiled": lambda: twin(query_TD, *bank, *out["compiled"]),
        "loop": lambda: _loop(query_TD, bank, *out["loop"]),
    }
    return {name: (calls[name], out[name]) for name in names}


def _loop(query_TD: Tensor, bank: Bank, best_T: Tensor, index_T: Tensor) -> None:
    signatures_ND, scale_N = bank
    for position, query_D in enumerate(query_TD.float()):
        cosine_N = signatures_ND.float() @ (query_D / torch.linalg.vector_norm(query_D))
        if scale_N is not None:
            cosine_N *= scale_N
        best_T[position], index_T[position] = cosine_N.max(0)


def run_case(name: str, query_TD: Tensor, bank: Bank, out: Report, compiler: Any = compiled) -> None:
    """Compare the variants' results, then time them; on a GPU a second time as CUDA graphs."""
    made = variants(query_TD, bank, compiler)
    for variant, (call, results) in made.items():
        call()
        check(variant, results, made["ours"][1])
    calls = {variant: call for variant, (call, _) in made.items()}
    signatures_ND, scale_N = bank
    moved = signatures_ND.nbytes + query_TD.nbytes + (0 if scale_N is None else scale_N.nbytes)
    shape = *query_TD.shape, len(signatures_ND), str(signatures_ND.dtype).removeprefix("torch."), moved
    out.add(Case(name, *shape), alternate(calls, out.rounds, out.device))
    if out.device.type == "cuda":
        captured = {variant: graph_of(call) for variant, call in calls.items()}
        out.add(Case(f"{name}_graph", *shape), alternate(captured, out.rounds, out.device))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = options("Find the nearest signature of each query, against torch.")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--signatures", type=numbers, default=[1_000, 100_000], help="comma-separated")
    parser.add_argument("--large", action="store_true", help="a million signatures as well")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", help="of the queries"
    )
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all cases; return the JSON line."""
    with report("match_signatures", arguments) as out:
        generator = torch.Generator(out.device).manual_seed(1)
        query_TD = torch.randn(arguments.queries, arguments.width, generator=generator, device=out.device)
        for count in arguments.signatures + [1_000_000] * arguments.large:
            for dtype in (torch.bfloat16, torch.int8):
                bank = random_bank(count, arguments.width, dtype, out.device)
                name = f"{str(dtype).removeprefix('torch.')}_{count}"
                run_case(name, query_TD.to(getattr(torch, arguments.dtype)), bank, out)
    return out.line


if __name__ == "__main__":
    main(parse())

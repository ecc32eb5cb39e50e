"""Score and fold a bank of 64 probes: the kernels, torch, compiled torch, and a loop over the probes.

    python kernels/bench/bench_score_fold.py

A decode step is one row for each of T requests; a prefill is one prompt of T rows, then eight that share them. Every
variant keeps a state of its own, and all see the same hidden states before anything is timed: states and maxima must
agree. ``compiled`` is the same mathematics as one graph, without a gather by slot, and ``loop`` shares the norms.

On a GPU, 16-bit hidden states meet weights with 16 bits of mantissa. Torch has no such product with an fp32 result, so
the baselines multiply in fp32.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from _bench import alternate, check, numbers, options
from _loop import Loop
from _probes import Bank, Step, random_bank, random_step
from _report import Case, Report, report
from _variants import Captured, Dense, Eager, Ours

__all__ = ["VARIANTS", "cases", "gate", "main", "parse", "run_case"]

_DECODE_TOKENS = 20
"""Tokens of a decoded request that the gate compares: more than the longest window."""
_MORE_ROUNDS = 10
"""A decode step is so much shorter than a prefill that it gets this many times the rounds."""

Maker = Callable[[Bank, Step], Any]
"""Makes a variant: something to call, whose ``state`` holds the streaming state."""

VARIANTS: dict[str, Maker] = {"ours": Ours, "eager": Eager, "compiled": Dense, "loop": Loop}
"""What is compared; ours with each of the others."""
_UNCAPTURED = ("eager", "loop")
"""Variants with host arrays, or with state tensors that change places."""


def gate(variants: Mapping[str, Any], step: Step) -> None:
    """Run all variants on the same rows, step after step, and compare states, counts and maxima over time.

    Args:
        variants: the first one is what the others are compared with.
        step: its hidden states are replaced.

    Raises:
        AssertionError: if a variant's results differ, or if they hold NaN.
    """
    first, *_ = variants.values()
    for seed in range(_DECODE_TOKENS if step.rows.one_each else 2):
        step.refill(seed)
        for name, run in variants.items():
            run()
            check(name, run.state, first.state)


def run_case(name: str, bank: Bank, step: Step, out: Report) -> None:
    """Compare the variants, then time them; on a GPU a second time as CUDA graphs, those that can be captured."""
    hidden_TD = step.hidden[0]
    rounds = out.rounds * (_MORE_ROUNDS if step.rows.one_each else 1)
    dtype = str(hidden_TD.dtype).removeprefix("torch.")
    variants = {variant: make(bank, step) for variant, make in VARIANTS.items()}
    gate(variants, step)
    case = Case(name, *hidden_TD.shape, bank.table.heads, dtype, _moved(bank, step))
    out.add(case, alternate(variants, rounds, out.device))
    if out.device.type == "cuda":
        captured = {variant: Captured(run, bank) for variant, run in variants.items() if variant not in _UNCAPTURED}
        gate({**captured, "eager": Eager(bank, step)}, step)
        out.add(replace(case, name=f"{name}_graph"), alternate(captured, rounds, out.device))


def _moved(bank: Bank, step: Step) -> int:
    """Return the bytes of hidden states, weights, logits (out and back in) and states (in and out)."""
    weights = [tensor for site in bank.sites for tensor in (site[0], site[-1]) if tensor is not None]
    state = bank.table.new_state(step.requests, bank.table.value.device)
    logits = 2 * 4 * len(step.rows.row_R) * bank.columns
    return sum(tensor.nbytes for tensor in (*step.hidden, *weights)) + logits + 2 * sum(part.nbytes for part in state)


def cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Bank, Step]]:
    """Yield the name, bank and step of each case."""
    dtype = getattr(torch, arguments.dtype)
    shapes = [("decode", rows, rows) for rows in arguments.decode]
    shapes += [
        (name, rows, requests) for rows in arguments.prefill for name, requests in (("prefill", 1), ("prefill8", 8))
    ]
    bank = random_bank(arguments.width, arguments.heads, arguments.sites, dtype, device)
    one_site = random_bank(arguments.width, arguments.heads, 1, dtype, device)
    for name, rows, requests in shapes:
        lengths = arguments.decode if name == "decode" else arguments.prefill
        suffix = f"_{rows}" if len(lengths) > 1 else ""
        yield name + suffix, bank, random_step(bank, rows, requests, dtype, device)
        if name == "decode":
            yield f"decode_site{suffix}", one_site, random_step(one_site, rows, requests, dtype, device)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = options("Score and fold a bank of probes, against torch.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--decode", type=numbers, default=[8], help="requests of a decode step, comma-separated")
    parser.add_argument("--prefill", type=numbers, default=[2048], help="rows of a prefill, comma-separated")
    parser.add_argument("--width", type=int, default=4096 if cuda else 576)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of the hidden states")
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all cases; return the JSON line."""
    with report("score_fold", arguments) as out:
        for name, bank, step in cases(arguments, out.device):
            run_case(name, bank, step, out)
    return out.line


if __name__ == "__main__":
    main(parse())

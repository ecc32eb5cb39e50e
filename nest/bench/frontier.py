"""Attack success against over-refusal, an arm a curve: over the strength of its change, and over its training."""

from contextlib import nullcontext
from typing import Any

from safetensors.torch import load_file

from nest.bench.measure import Bench, Results
from nest.bench.plan import Run
from nest.bench.train import Trained
from nest.full import Change

__all__ = ["Frontier", "frontier"]

Frontier = dict[str, Results]
"""Points by strength (``alpha``) and by steps of training (``steps``)."""


def frontier(bench: Bench, run: Run, done: Trained, rate: float) -> Frontier:
    """Measure an arm at every strength and milestone of the configuration; ``done`` is left as it was."""
    change, end = done.change, done.change.values()
    by_alpha = {f"{alpha:g}": _point(bench, run, change, rate, alpha) for alpha in bench.config.alphas}
    by_steps = {}
    for steps, file in done.snapshots.items():
        change.put(load_file(file))
        by_steps[str(steps)] = bench.few(f"{run.name}-step{steps}", change.folded(), rate)
    change.put(end)
    if by_steps:
        by_steps[str(bench.config.tune.steps)] = _point(bench, run, change, rate, 1.0)
    return {"alpha": by_alpha, "steps": by_steps}


def _point(bench: Bench, run: Run, change: Change, rate: float, alpha: float) -> dict[str, Any]:
    change.alpha = alpha
    try:
        return bench.few(f"{run.name}-alpha{alpha:g}", change.folded() if alpha else nullcontext(), rate)
    finally:
        change.alpha = 1.0

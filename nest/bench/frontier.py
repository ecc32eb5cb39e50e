"""Attack success against over-refusal, an arm a curve: over the strength of its change, and over its training."""

from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file

from nest.bench.measure import Bench, Results
from nest.bench.plan import Run
from nest.bench.train import Trained
from nest.full import Change

__all__ = ["Frontier", "frontier"]

Frontier = dict[str, Results]
"""Points by strength (``alpha``) and by steps of training (``steps``)."""


def frontier(bench: Bench, run: Run, done: Trained, rate: float, result: Mapping[str, Any]) -> Frontier:
    """Measure an arm at every strength and milestone of the configuration; ``done`` is left as it was.

    Args:
        bench: measures.
        run: the arm's first.
        done: the same, trained.
        rate: learning rate.
        result: of the same, the whole change after all steps: that point is not measured again.
    """
    config, change, end = bench.config, done.change, done.change.values()
    by_alpha = {
        f"{alpha:g}": dict(result) if alpha == 1 else _at_strength(bench, run, change, rate, alpha)
        for alpha in config.alphas
    }
    by_steps = {}
    for steps, file in done.snapshots.items():
        change.put(load_file(file))
        by_steps[str(steps)] = bench.point(f"{run.name}-step{steps}", change.folded(), rate)
    change.put(end)
    if by_steps:
        by_steps[str(config.tune.steps)] = dict(result)
    return {"alpha": by_alpha, "steps": by_steps}


def _at_strength(bench: Bench, run: Run, change: Change, rate: float, alpha: float) -> dict[str, Any]:
    change.alpha = alpha
    try:
        return bench.point(f"{run.name}-alpha{alpha:g}", change.folded(), rate)
    finally:
        change.alpha = 1.0

"""Attack success against over-refusal, an arm a curve: over the strength of its change, and over its training."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from nest.bench.measure import Bench, Results
from nest.bench.patches import patch_of
from nest.bench.plan import Run
from nest.bench.train import Trained
from nest.delta import Deltas
from nest.full import Change
from spider_sense.guard import Guard
from spider_sense.monitor import Monitor
from spider_sense.policy import Patch, Policy, Rule

__all__ = ["Frontier", "frontier", "guarded_frontier"]

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


def guarded_frontier(bench: Bench, run: Run, done: Trained, rate: float, folder: Path) -> Frontier:
    """Measure nest's patch again, on only for the requests that a guard suspects, from that token on.

    Raises:
        ArtifactError: if the folder holds no guard that can be used.
        MismatchError: if the guard is another model's.
    """
    assert isinstance(done.change, Deltas)
    guard, patch = Guard.from_pretrained(folder), patch_of(done.change, bench.stage, bench.config)
    rules = tuple(Rule(detector="*", zone=zone, action="patch") for zone in ("breach", "suspect"))
    points = {}
    for alpha in bench.config.alphas:
        # The verdict on the prompt comes before the first token that the patch may change.
        policy = Policy(rules=rules, patch=Patch(alpha=alpha), same_step=True)
        name = f"{run.name}-guard-{guard.digest}-alpha{alpha:g}"
        monitor = Monitor(guard, policy, patch=patch)
        attached = monitor.attach(bench.stage.loaded.model, bench.stage.loaded.tokenizer)
        points[f"{alpha:g}"] = bench.few(name, attached, rate, through_generate=True)
    return {"alpha": points, "steps": {}}


def _point(bench: Bench, run: Run, change: Change, rate: float, alpha: float) -> dict[str, Any]:
    change.alpha = alpha
    try:
        return bench.few(f"{run.name}-alpha{alpha:g}", change.folded() if alpha else nullcontext(), rate)
    finally:
        change.alpha = 1.0

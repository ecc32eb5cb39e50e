"""Run the comparison arm by arm; everything that is finished is kept, so it can be cut off and started again."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nest.bench.config import BenchConfig
from nest.bench.frontier import Frontier, frontier
from nest.bench.measure import Bench, Results
from nest.bench.patches import patch_bytes
from nest.bench.plan import Run, plan
from nest.bench.train import choose_rate, trained

__all__ = ["Compared", "Finished", "collect", "run_base", "run_bench", "run_one"]

Compared = tuple[Results, dict[str, Frontier]]
"""The results by run, and by arm its frontier; ``base`` has the one point that all of them start from."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One run, trained and measured."""

    run: Run
    result: dict[str, Any]
    frontier: Frontier | None
    """Of an arm's first run."""


def run_bench(bench: Bench) -> Compared:
    """Train and measure every arm.

    Args:
        bench: holds the configuration and what all runs share.
    """
    base = run_base(bench)
    return collect(bench.config, base, [run_one(bench, run) for run in plan(bench.config)])


def run_base(bench: Bench) -> dict[str, Any]:
    """Measure the model as it came."""
    nothing = {"trained_parameters": 0, "trained_share": 0.0, "patch_bytes": 0, "train_seconds": 0.0}
    return {**bench.measure("base", None), **nothing}


def run_one(bench: Bench, run: Run) -> Finished:
    """Train and measure one run, and where it is an arm's first, its frontier."""
    config, stage = bench.config, bench.stage
    drawn = run.seed == config.seeds[0] and run.draw == run.seed
    rate = choose_rate(run.arm, stage, config, bench.steps)
    done = trained(run, stage, config, rate, bench.steps, config.milestone_steps() if drawn else ())
    result = {
        **bench.measure(run.name, done.change, rate),
        "trained_parameters": done.change.count(),
        "trained_share": done.change.count() / bench.parameters,
        "patch_bytes": patch_bytes(run, done.change, stage, config),
        "train_seconds": round(done.seconds, 3),
        "learning_rate": rate,
    }
    curves = frontier(bench, run, done, rate, result) if drawn and _wanted(config) else None
    return Finished(run, result, curves)


def collect(config: BenchConfig, base: dict[str, Any], finished: Iterable[Finished]) -> Compared:
    """Return what was measured by its names."""
    results: Results = {"base": base}
    frontiers: dict[str, Frontier] = {"base": {"alpha": {"0": base}, "steps": {}}} if _wanted(config) else {}
    for one in finished:
        results[one.run.name] = one.result
        if one.frontier is not None:
            frontiers[one.run.arm] = one.frontier
    return results, frontiers


def _wanted(config: BenchConfig) -> bool:
    return bool(config.alphas or config.milestones)

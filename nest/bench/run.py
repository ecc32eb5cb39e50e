"""Run the comparison arm by arm; everything that is finished is kept, so it can be cut off and started again."""

from rich.progress import Progress

from nest.bench.config import BenchConfig
from nest.bench.frontier import Frontier, frontier, guarded_frontier
from nest.bench.measure import Bench, Results
from nest.bench.patches import patch_bytes
from nest.bench.plan import plan
from nest.bench.stage import set_stage
from nest.bench.train import choose_rate, trained

__all__ = ["GUARDED", "run_bench"]

GUARDED = "nest, where the guard suspects"
"""Name of the frontier of nest's patch when a guard switches it on."""


def run_bench(config: BenchConfig, progress: Progress) -> tuple[Results, dict[str, Frontier]]:
    """Train and measure every arm.

    Returns:
        The results by run, and by arm its frontier; ``base`` has the one point that all of them start from.
    """
    stage = set_stage(config, progress)
    bench = Bench(config, stage, progress)
    nothing = {"trained_parameters": 0, "trained_share": 0.0, "patch_bytes": 0, "train_seconds": 0.0}
    results: Results = {"base": {**bench.measure("base", None), **nothing}}
    frontiers: dict[str, Frontier] = {"base": bench.start()} if config.alphas or config.milestones else {}
    for run in plan(config):
        drawn = run.seed == config.seeds[0] and run.draw == run.seed
        rate = choose_rate(run.arm, stage, config, bench.steps)
        done = trained(run, stage, config, rate, bench.steps, config.milestone_steps() if drawn else ())
        results[run.name] = {
            **bench.measure(run.name, done.change, rate),
            "trained_parameters": done.change.count(),
            "trained_share": done.change.count() / bench.parameters,
            "patch_bytes": patch_bytes(run, done.change, stage, config),
            "train_seconds": round(done.seconds, 1),
            "learning_rate": rate,
        }
        if drawn and frontiers:
            frontiers[run.arm] = frontier(bench, run, done, rate)
            if run.arm == "nest" and config.guard is not None:
                frontiers[GUARDED] = guarded_frontier(bench, run, done, rate, config.guard)
    return results, frontiers

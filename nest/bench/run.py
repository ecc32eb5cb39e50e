"""Run the comparison arm by arm; everything that is finished is kept, so it can be cut off and started again."""

from nest.bench.frontier import Frontier, frontier
from nest.bench.measure import Bench, Results
from nest.bench.patches import patch_bytes
from nest.bench.plan import plan
from nest.bench.train import choose_rate, trained

__all__ = ["run_bench"]


def run_bench(bench: Bench) -> tuple[Results, dict[str, Frontier]]:
    """Train and measure every arm.

    Args:
        bench: holds the configuration and what all runs share.

    Returns:
        The results by run, and by arm its frontier; ``base`` has the one point that all of them start from.
    """
    config, stage = bench.config, bench.stage
    nothing = {"trained_parameters": 0, "trained_share": 0.0, "patch_bytes": 0, "train_seconds": 0.0}
    results: Results = {"base": {**bench.measure("base", None), **nothing}}
    wanted = bool(config.alphas or config.milestones)
    frontiers: dict[str, Frontier] = {"base": {"alpha": {"0": results["base"]}, "steps": {}}} if wanted else {}
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
            frontiers[run.arm] = frontier(bench, run, done, rate, results[run.name])
    return results, frontiers

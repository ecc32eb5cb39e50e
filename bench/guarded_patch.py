"""`nest bench` with one frontier more: nest's patch switched on by a guard, for the requests that it suspects.

    python bench/guarded_patch.py --config configs/nest-bench.yaml --guard runs/full/guard

Everything that `nest bench` finished with the same configuration is taken up, not done again.
"""

from pathlib import Path
from typing import Annotated

import typer

from nest.bench.config import BenchConfig
from nest.bench.frontier import Frontier
from nest.bench.measure import Bench
from nest.bench.patches import patch_of
from nest.bench.plan import Run
from nest.bench.processes import run_processes
from nest.bench.run import run_bench
from nest.bench.stage import set_stage
from nest.bench.train import choose_rate, trained
from nest.cli.bench import show
from nest.delta import Deltas
from spider_sense.cli.train import progress_bars
from spider_sense.config import load_yaml
from spider_sense.guard import Guard
from spider_sense.monitor import Monitor
from spider_sense.policy import Patch, Policy, Rule

NAME = "nest, where the guard suspects"


def main(
    config: Annotated[Path, typer.Option(help="The comparison, as for `nest bench`.")],
    guard: Annotated[Path, typer.Option(help="Folder of a guard for the same model.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time, as of `nest bench`.")] = 1,
) -> None:
    """Run the comparison, and nest's frontier once more behind a guard."""
    settings, watcher = load_yaml(config, BenchConfig), Guard.from_pretrained(guard)
    with progress_bars() as progress:
        if processes > 1:
            run_processes(settings, progress, device, processes)
        bench = Bench(settings, set_stage(settings, progress, device), progress)
        results, frontiers = run_bench(bench)
        frontiers[NAME] = guarded_frontier(bench, watcher)
    show(results, frontiers, settings)


def guarded_frontier(bench: Bench, guard: Guard) -> Frontier:
    """Measure nest's patch at every strength, on only for the requests that a guard suspects, from that token on.

    Raises:
        MismatchError: if the guard is another model's.
    """
    settings, stage = bench.config, bench.stage
    run = Run("nest", settings.seeds[0], settings.seeds[0])
    rate = choose_rate(run.arm, stage, settings, bench.steps)
    change = trained(run, stage, settings, rate, bench.steps).change
    assert isinstance(change, Deltas)
    patch = patch_of(change, stage, settings)
    rules = tuple(Rule(detector="*", zone=zone, action="patch") for zone in ("breach", "suspect"))
    points = {}
    for alpha in settings.alphas:
        # The verdict on the prompt comes before the first token that the patch may change.
        monitor = Monitor(guard, Policy(rules=rules, patch=Patch(alpha=alpha), same_step=True), patch=patch)
        attached = monitor.attach(stage.loaded.model, stage.loaded.tokenizer)
        name = f"{run.name}-guard-{guard.digest}-alpha{alpha:g}"
        points[f"{alpha:g}"] = bench.point(name, attached, rate, through_generate=True)
    return {"alpha": points, "steps": {}}


if __name__ == "__main__":
    typer.run(main)

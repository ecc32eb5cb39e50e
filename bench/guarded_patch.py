"""`nest bench` with three frontiers more: nest's patch for the requests that a guard suspects.

Once it is switched on where the suspicion arises, as the policy action `patch` does, and once from the first token of
the prompt, which has to be read a second time for that. Beside them stands what needs no patch: stopping them.

    python bench/guarded_patch.py --config configs/nest-bench.yaml --guard runs/full/guard

Everything that `nest bench` finished with the same configuration is taken up, not done again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from nest.answers import generate_answers
from nest.bench.config import BenchConfig
from nest.bench.frontier import Frontier
from nest.bench.measure import Bench, Results
from nest.bench.patches import patch_of
from nest.bench.plan import Run
from nest.bench.processes import run_processes
from nest.bench.run import run_bench
from nest.bench.stage import set_stage
from nest.bench.train import choose_rate, trained
from nest.cli.bench import show
from nest.delta import Deltas
from nest.figures import figures_of
from spider_sense.cli.app import run
from spider_sense.cli.progress import progress_bars
from spider_sense.config import load_yaml
from spider_sense.data import Example
from spider_sense.guard import Guard
from spider_sense.monitor import Monitor
from spider_sense.policy import Patch, Policy, Rule

LIVE = "nest, from where the guard suspects on"
AGAIN = "nest, prompts read again where it suspects"
STOP = "stopped where the guard suspects"
PARTS = ("harmful", "benign", "borderline")
JUDGES = ("refused", "refused_classifier")
Suspected = Mapping[str, list[bool]]
"""By part, in the order of a result's rows."""


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
        if "nest" in frontiers:
            frontiers[LIVE] = guarded_frontier(bench, watcher)
            suspected = suspects(bench, watcher)
            frontiers[AGAIN] = read_again(bench, suspected, results["base"], frontiers["nest"]["alpha"])
            frontiers[STOP] = read_again(bench, suspected, results["base"], {"1": all_refused(results["base"])})
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


def read_again(bench: Bench, suspected: Suspected, base: Mapping[str, Any], changed: Results) -> Frontier:
    """Return an arm's frontier if only the prompts that a guard suspects are answered by it, from their first token on.

    No answer is generated for it: a prompt's outcome is the arm's where it is suspected, and elsewhere the base's.

    Args:
        bench: holds the configuration.
        suspected: from :func:`suspects`.
        base: result of the base model.
        changed: the arm's results by strength.
    """
    settings = bench.config.evaluate
    points = {}
    for alpha, result in changed.items():
        rows = {part: _mixed(result["rows"][part], base["rows"][part], flags) for part, flags in suspected.items()}
        points[alpha] = figures_of(rows, settings.seed, settings.resamples)
    return {"alpha": points, "steps": {}}


def all_refused(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result in which every prompt is refused."""
    rows = {part: {**base["rows"][part]} for part in PARTS if part in base["rows"]}
    for row in rows.values():
        row.update({judge: [True] * len(row["ids"]) for judge in JUDGES})
    return {"rows": rows}


def suspects(bench: Bench, guard: Guard) -> Suspected:
    """Return of each prompt whether the guard suspects it at its end."""
    stage = bench.stage
    attached = Monitor(guard, Policy(rules=())).attach(stage.loaded.model, stage.loaded.tokenizer)

    def suspected(example: Example) -> bool:
        options: Any = {"max_prompt_tokens": bench.config.evaluate.max_prompt_tokens, "through_generate": True}
        generate_answers(stage.loaded, [example.turns or example.text], max_new_tokens=1, **options)
        return bool((attached.cases[0].zone > 0).any())

    with attached:
        parts = {part: getattr(stage.sets, part) for part in PARTS}
        return {part: [suspected(example) for example in prompts] for part, prompts in parts.items() if prompts}


def _mixed(patched: Mapping[str, Any], base: Mapping[str, Any], suspected: list[bool]) -> dict[str, Any]:
    return {
        **patched,
        **{
            judge: [one if on else other for one, other, on in zip(patched[judge], base[judge], suspected, strict=True)]
            for judge in JUDGES
        },
    }


if __name__ == "__main__":
    cli = typer.Typer(pretty_exceptions_enable=False)
    cli.command()(main)
    run(cli)

"""``nest bench``."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest.cli.app import app, console
from spider_sense.cli.progress import progress_bars

if TYPE_CHECKING:
    from nest.bench.config import BenchConfig
    from nest.bench.frontier import Frontier
    from nest.bench.measure import Results

__all__ = ["bench", "show"]


@app.command()
def bench(
    config: Annotated[Path, typer.Option(help="YAML file, such as configs/nest-bench.yaml.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
) -> None:
    """Tune and measure every arm; a run that is cut off goes on where it stopped. The last line is JSON."""
    from nest.bench.config import BenchConfig
    from nest.bench.measure import Bench
    from nest.bench.processes import run_processes
    from nest.bench.run import run_bench
    from nest.bench.stage import set_stage
    from spider_sense.config import load_yaml

    settings = load_yaml(config, BenchConfig)
    with progress_bars() as progress:
        if processes > 1:
            results, frontiers = run_processes(settings, progress, device, processes)
        else:
            results, frontiers = run_bench(Bench(settings, set_stage(settings, progress, device), progress))
    show(results, frontiers, settings)


def show(results: "Results", frontiers: "Mapping[str, Frontier]", settings: "BenchConfig") -> None:
    """Print the table and the line of JSON, and draw the pictures into the output folder.

    Args:
        results: from :func:`nest.bench.run.run_bench`.
        frontiers: from the same, and others to draw beside them.
        settings: the comparison.
    """
    from nest.bench.summary import summarise_all
    from nest.cli.bench_table import arms_table
    from nest.pictures.compare import draw_comparison
    from nest.pictures.frontier import draw_frontier

    arms = summarise_all(results)
    console.print(arms_table(arms))
    if frontiers and frontiers["base"]["alpha"]["0"]["over_refusal_borderline"]:
        draw_frontier(frontiers, settings.output / "frontier.png")
    if arms["base"]["utility"] is not None:
        shown = {arm: _with_intervals(figures) for arm, figures in arms.items()}
        draw_comparison(shown, "utility", settings.output / "arms.png")
    console.print(f"wrote {settings.output}", markup=False)
    points = {
        arm: {by: {at: _point(result) for at, result in curve.items()} for by, curve in curves.items()}
        for arm, curves in frontiers.items()
    }
    typer.echo(json.dumps(_finite({**arms, "frontier": points}), allow_nan=False))


def _with_intervals(figures: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return an arm's figures in the form that those of a single evaluation have."""
    return {
        name: {"value": figures[name], "low": low, "high": high} for name, (low, high) in figures["intervals"].items()
    }


def _point(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("asr", "over_refusal", "over_refusal_borderline")}


def _finite(value: Any) -> Any:
    """Return the value with None for what JSON has no word for, such as the perplexity of a run that diverged."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

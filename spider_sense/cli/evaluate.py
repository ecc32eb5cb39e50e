"""``spider-sense eval``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.options import AllowUncertified, AsJson, Device, Dtype, Model
from spider_sense.cli.progress import progress_bars
from spider_sense.cli.tables import results_table

__all__ = ["evaluate"]


@app.command(name="eval")
def evaluate(
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    model: Model,
    data: Annotated[list[Path], typer.Option(help="JSONL files with id, text, label; repeat or list them.")],
    more: Annotated[list[Path] | None, typer.Argument(help="Further JSONL files.")] = None,
    detector: Annotated[str | None, typer.Option(help="Detector of the guard; by default its first.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="LABEL=positive, LABEL=negative or LABEL=ignore.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    allow_uncertified: AllowUncertified = False,
    as_json: AsJson = False,
) -> None:
    """Measure a guard on prompt sets, with its controls beside it."""
    from spider_sense.evaluation import detector_labels, evaluate_folder
    from spider_sense.models import load_model
    from spider_sense.training.config import read_sets

    sets = read_sets(tuple(map(str, [*data, *(more or [])])))
    label_map = detector_labels(guard, detector).with_overrides(label or [])
    loaded = load_model(model, dtype, device)
    with progress_bars() as progress:
        bar = progress.add_task("Scoring prompts", total=sum(map(len, sets.values())))
        results = evaluate_folder(
            guard,
            loaded,
            sets,
            label_map,
            detector,
            allow_uncertified,
            lambda count: progress.advance(bar, count),
        )
    console.print(results_table(results))
    if results["ignored"]["rows"]:
        console.print(
            f"ignored {results['ignored']['rows']} rows by label: {results['ignored']['labels']}", markup=False
        )
    if as_json:
        typer.echo(json.dumps(results))

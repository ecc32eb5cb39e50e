"""``spider-sense eval``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.tables import results_table
from spider_sense.cli.train import progress_bars

__all__ = ["evaluate"]


@app.command(name="eval")
def evaluate(
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")],
    data: Annotated[list[Path], typer.Option(help="JSONL files with id, text, label; repeat or list them.")],
    more: Annotated[list[Path] | None, typer.Argument(help="Further JSONL files.")] = None,
    detector: Annotated[str | None, typer.Option(help="Detector of the guard; by default its first.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="LABEL=positive, LABEL=negative or LABEL=ignore.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    allow_uncertified: Annotated[bool, typer.Option(help="Accept another serving configuration.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
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

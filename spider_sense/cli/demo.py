"""``spider-sense demo``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from spider_sense.cli.app import app, console
from spider_sense.cli.options import Model
from spider_sense.cli.plain import plain
from spider_sense.cli.progress import progress_bars
from spider_sense.cli.tables import results_table, sweep_table

__all__ = ["demo"]

SHOWN = 60


@app.command()
def demo(
    work: Annotated[Path, typer.Option(help="Folder for the guard and the captured activations.")] = Path("runs/demo"),
    model: Model = "smollm2",
) -> None:
    """Train a guard on the shipped corpus and show it stopping misuse; the last line is one JSON document."""
    from spider_sense.demo import run_demo
    from spider_sense.models import load_model
    from spider_sense.training.config import TrainConfig

    console.print("Loading the model (a .gguf file is converted once, about 30 s)")
    loaded = load_model(model, "float32")
    config = TrainConfig(model=model, output=work / "guard", work=work / "activations")
    with progress_bars() as progress:
        shown = run_demo(config, loaded, progress)
    for name, sweep in shown.trained.sweeps.items():
        console.print(sweep_table(sweep))
        console.print(results_table(shown.trained.results[name]))
    table = Table(title="A mixed batch under the guard")
    for column in ("prompt", "label", "action", "after", "answer"):
        table.add_column(column)
    for row in shown.rows:
        after = (
            "" if row["stopped_after"] is None else f"{row['stopped_after']} token{'s' * (row['stopped_after'] != 1)}"
        )
        label = "harmful" if row["harmful"] else "benign"
        table.add_row(plain(row["prompt"][:SHOWN]), label, row["action"], after, plain(row["text"][:SHOWN]))
    console.print(table)
    console.print(
        f"guard written to {shown.trained.folder}; next: "
        f'spider-sense generate --guard {shown.trained.folder} --prompt "..."',
        markup=False,
    )
    typer.echo(json.dumps(shown.summary()))

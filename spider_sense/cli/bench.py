"""``spider-sense bench``."""

import json
from typing import Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.options import Device, Dtype, Model
from spider_sense.cli.progress import progress_bars

__all__ = ["bench"]

FEWEST = 5
"""Rounds whose spread tells something."""


@app.command()
def bench(
    model: Model = "smollm2",
    batch: Annotated[int, typer.Option(min=1)] = 8,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Time generation with a guard, and with a live patch beside it, against bare generation.

    The last line is one JSON document.
    """
    from spider_sense.bench import bench as run
    from spider_sense.models import load_model

    loaded = load_model(model, dtype, device)
    with progress_bars() as progress:
        bar = progress.add_task("Rounds", total=rounds + 1)
        result = run(loaded, batch, new_tokens, rounds, lambda: progress.advance(bar))
    for name, speed in result["tokens_per_s"].items():
        told = ""
        if name != "bare":
            low, high = result[f"{name}_interval"]
            spread = f" ({low:.3f}-{high:.3f})" if rounds >= FEWEST else ""
            told = f", {result[f'{name}_ratio']:.3f}{spread} of bare"
        console.print(f"{name:>16}: {speed:8.1f} tokens/s{told}", highlight=False)
    typer.echo(json.dumps(result))

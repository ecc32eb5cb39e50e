"""``spider-sense evade``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.tables import transforms_table
from spider_sense.cli.train import progress_bars

__all__ = ["evade"]


@app.command()
def evade(
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")],
    detector: Annotated[str | None, typer.Option(help="Detector of misuse; by default the guard's first.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    allow_uncertified: Annotated[bool, typer.Option(help="Accept another serving configuration.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Measure a guard on held-out requests that are diluted, encoded, translated, spread over turns or dressed up."""
    from spider_sense.corpus import load_evasion
    from spider_sense.evasion import TRANSFORMS, evasion_table
    from spider_sense.fingerprint import fingerprint, serving_config
    from spider_sense.guard import Guard
    from spider_sense.models import load_model

    which = Guard.from_pretrained(guard)
    loaded = load_model(model, dtype, device)
    which.check_model(fingerprint(loaded), serving_config(loaded.model), allow_uncertified)
    with progress_bars() as progress:
        bar = progress.add_task("Scoring prompts", total=len(TRANSFORMS) * len(load_evasion()))
        results = evasion_table(which, loaded, detector, lambda count: progress.advance(bar, count))
    console.print(transforms_table(results))
    if as_json:
        typer.echo(json.dumps(results))

"""``spider-sense evade``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.options import AllowUncertified, AsJson, Device, Dtype, Model
from spider_sense.cli.progress import progress_bars
from spider_sense.cli.tables import transforms_table
from spider_sense.errors import GuardError

__all__ = ["evade"]


@app.command()
def evade(
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    model: Model,
    detector: Annotated[str | None, typer.Option(help="Detector of misuse; by default the guard's first.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    allow_uncertified: AllowUncertified = False,
    as_json: AsJson = False,
) -> None:
    """Measure a guard on held-out requests that are diluted, encoded, translated, spread over turns or dressed up."""
    from spider_sense.corpus import load_evasion
    from spider_sense.evasion import TRANSFORMS, evasion_table
    from spider_sense.fingerprint import fingerprint, serving_config
    from spider_sense.guard import Guard
    from spider_sense.models import load_model
    from spider_sense.screening.stage_guard import reads_stages

    which = Guard.from_pretrained(guard)
    if reads_stages(which):
        raise GuardError(
            f"{guard} has probes of an agent's stages, and evade reads whole requests; name a guard of those"
        )
    loaded = load_model(model, dtype, device)
    which.check_model(fingerprint(loaded), serving_config(loaded.model), allow_uncertified)
    with progress_bars() as progress:
        bar = progress.add_task("Scoring prompts", total=len(TRANSFORMS) * len(load_evasion()))
        results = evasion_table(which, loaded, detector, lambda count: progress.advance(bar, count))
    console.print(transforms_table(results))
    if as_json:
        typer.echo(json.dumps(results))

"""``nest find``."""

import time
from pathlib import Path
from typing import Annotated

import typer

from nest.cli.app import app, console
from spider_sense.cli.progress import progress_bars

__all__ = ["find"]


@app.command(name="find")
def find(
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")],
    harmful: Annotated[list[str], typer.Option(help="JSONL file, or corpus for the package's pairs; repeat it.")],
    benign: Annotated[list[str], typer.Option(help="The same for the prompts to tell them from.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="probe, raw, contrast or effect_size.")] = "probe",
    z: Annotated[float, typer.Option(help="Rows with a z-score above it are kept.")] = 3.0,
    utility: Annotated[
        list[str] | None,
        typer.Option(help="Prompts whose neurons, found the same way, are dropped; or a folder of util_*.jsonl."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most prompts of a side, drawn by hash.", min=1)] = None,
    max_tokens: Annotated[int, typer.Option(help="A longer prompt loses tokens from its middle.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Prompts of a forward pass.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the draw, the held-out part and the recipe raw.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Find the neurons that tell harmful from benign prompts."""
    from nest.cli.tables import found_table
    from nest.find import FindConfig
    from nest.find import find as run
    from nest.neurons import KIND
    from nest.pictures.spread import draw_spread
    from nest.prompts import load_prompts
    from nest.selection import FEWEST
    from nest.tasks import utility_files
    from spider_sense.config import parse
    from spider_sense.models import load_model

    settings = {"recipe": recipe, "z": z, "max_tokens": max_tokens, "batch_size": batch_size, "seed": seed}
    config = parse(settings, FindConfig, origin="nest find")
    config.chosen()
    KIND.check_replaceable(out)
    sides = [load_prompts(harmful, "harmful", limit, seed), load_prompts(benign, "benign", limit, seed)]
    spare = list(map(str, utility_files(utility or [])))
    spared = load_prompts(spare, "benign", limit, seed) if spare else None
    loaded = load_model(model, dtype, device)
    started = time.monotonic()
    with progress_bars() as progress:
        found = run(
            loaded, sides[0].examples, sides[1].examples, config, spared.examples if spared else None, progress
        ).save_pretrained(out)
    draw_spread(found, out / "spread.png")
    console.print(found_table(found))
    if left_out := found.manifest.left_out:
        console.print(
            f"left out: {len(left_out)} of {len(left_out) + len(found.manifest.modules)} projections, in experts that "
            f"fewer than {FEWEST} harmful or {FEWEST} benign prompts reach, or of one class none that is fitted"
        )
    for side in [*sides, *([spared] if spared else [])]:
        if side.left_out:
            console.print(f"left out by label: {dict(side.left_out)}", markup=False)
    console.print(f"wrote {out} and its spread.png in {time.monotonic() - started:.0f} s", markup=False)

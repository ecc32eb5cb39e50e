"""``nest merge``."""

from pathlib import Path
from typing import Annotated

import typer

from nest.cli.app import app

__all__ = ["merge"]


@app.command()
def merge(
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")],
    patch: Annotated[list[Path], typer.Option(help="Patch folder; repeat it for more.")],
    out: Annotated[Path, typer.Option(help="Where to write the merged model.")],
    alpha: Annotated[float | None, typer.Option(help="Strength of all; by default what each is meant for.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Fold patches into a model for good, without keeping the original rows; where they overlap, they add."""
    from nest.merge import KIND, check_patches, write_merged
    from spider_sense.models import load_model
    from spider_sense.patch import NeuronPatch

    read = [NeuronPatch.from_pretrained(folder) for folder in patch]
    KIND.check_replaceable(out)
    check_patches(model, read, alpha)
    done = write_merged(load_model(model, dtype, device), read, out, alpha)
    folded = ", ".join(f"{part.digest} at alpha {part.alpha:g}" for part in done.patches)
    typer.echo(f"wrote {out}: {folded}, in {done.rows} rows; `nest revert` cannot take them out again")
    if len(read) > 1:
        typer.echo(f"{done.overlapping_rows} rows are in more than one patch and got the sum of their deltas")

"""``nest apply``."""

from pathlib import Path
from typing import Annotated

import typer

from nest.cli.app import app

__all__ = ["apply"]


@app.command()
def apply(
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")],
    patch: Annotated[Path, typer.Option(help="Patch folder.")],
    out: Annotated[Path, typer.Option(help="Where to write the patched model.")],
    alpha: Annotated[float | None, typer.Option(help="Strength; by default what the patch is meant for.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Write a model with a patch in its weights, and the original rows beside it so that it can be reverted."""
    from nest.apply import KIND, check_unpatched, write_patched
    from spider_sense.models import load_model
    from spider_sense.patch import NeuronPatch
    from spider_sense.patching import scaled

    read = NeuronPatch.from_pretrained(patch)
    KIND.check_replaceable(out)
    check_unpatched(model, read)
    scaled(read, alpha)
    done = write_patched(load_model(model, dtype, device), read, out, alpha)
    rows = sum(len(target.neuron_R) for target in read.targets.values())
    typer.echo(
        f"wrote {out}: patch {done.patch_digest} at alpha {done.alpha:g} in {rows} rows of {len(read.targets)} "
        f"projections, {done.dtype}; `nest revert {out} --out DIR` takes it out again"
    )

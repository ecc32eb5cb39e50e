"""``nest export``."""

from pathlib import Path
from typing import Annotated

import typer

from nest.cli.app import app

__all__ = ["export"]


@app.command()
def export(
    model: Annotated[str, typer.Option(help="The model that the patch was tuned for: hub id, folder or .gguf file.")],
    patch: Annotated[Path, typer.Option(help="Patch folder.")],
    out: Annotated[Path, typer.Option(help="Where to write the adapter.")],
    alpha: Annotated[float | None, typer.Option(help="Strength; by default what the patch is meant for.")] = None,
) -> None:
    """Write a patch as a LoRA adapter, which peft and vLLM load as they load any."""
    from nest.export import KIND, check_exportable, write_adapter
    from spider_sense.models import load_model
    from spider_sense.patch import NeuronPatch
    from spider_sense.patching import scaled

    read = NeuronPatch.from_pretrained(patch)
    check_exportable(read)
    KIND.check_replaceable(out)
    scaled(read, alpha)
    done = write_adapter(load_model(model), read, out, alpha)
    typer.echo(
        f"wrote {out}: patch {done.patch_digest} at alpha {done.alpha:g} as a LoRA of rank {done.rank} on "
        f"{len(done.modules)} modules"
    )

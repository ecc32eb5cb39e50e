"""``nest revert``."""

from pathlib import Path
from typing import Annotated

import typer

from nest.cli.app import app
from spider_sense.printable import printable

__all__ = ["revert"]


@app.command()
def revert(
    folder: Annotated[Path, typer.Argument(help="What `nest apply` wrote.")],
    out: Annotated[Path, typer.Option(help="Where to write the model without the patch; may be the same folder.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Write a patched model as it was before, bit for bit."""
    from nest.revert import write_reverted

    done = write_reverted(folder, out, device)
    # The name stands in a file that may come from anybody.
    base = printable(done.base.base_model)
    typer.echo(
        f"wrote {out} without patch {done.patch_digest}: all weights are bit for bit those of {base} "
        f"in {done.dtype}, SHA-256 {done.weights_digest}"
    )

"""``nest compare``."""

from pathlib import Path
from typing import Annotated

import typer

from nest.cli.app import app, console

__all__ = ["compare"]


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Result files of nest eval; the first is the base.")],
    out: Annotated[Path, typer.Option(help="PNG to write; without an ending it gets .png.")],
    against: Annotated[
        str, typer.Option(help="Horizontal axis: utility, over_refusal, over_refusal_borderline, perplexity or kl.")
    ] = "utility",
) -> None:
    """Show evaluations side by side, as a table and as a picture of safety against utility."""
    from nest.cli.eval_tables import comparison_table
    from nest.figures import differences
    from nest.parts import read_results
    from nest.pictures.compare import draw_comparison

    named = read_results(results)
    base, *others = named
    changes = {name: differences(named[name]["rows"], named[base]["rows"]) for name in others}
    picture = draw_comparison(named, against, out)
    console.print(comparison_table(named, changes))
    console.print(f"wrote {picture}", markup=False)

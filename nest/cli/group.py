"""``nest group``."""

from pathlib import Path
from typing import Annotated

import typer

from nest.cli.app import app, console

__all__ = ["group"]


@app.command(name="group")
def group(
    neurons: Annotated[Path, typer.Argument(help="Folder that `nest find` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    method: Annotated[str, typer.Option(help="kmeans, one, random or untied.")] = "kmeans",
    k_max: Annotated[int, typer.Option(help="Most groups of a projection.")] = 3,
    k: Annotated[int | None, typer.Option(help="This many groups, instead of the best number up to k-max.")] = None,
    seed: Annotated[int, typer.Option(help="Of k-means, and of the method random.")] = 0,
) -> None:
    """Group neurons that act alike; the rows of a group will share one tuned vector."""
    from nest.cli.tables import grouped_table
    from nest.group import GroupConfig
    from nest.group import group as run
    from nest.neurons import KIND, NeuronSet
    from spider_sense.config import parse

    settings = {"method": method, "k_max": k_max, "k": k, "seed": seed}
    config = parse(settings, GroupConfig, origin="nest group")
    KIND.check_replaceable(out)
    grouped = run(NeuronSet.from_pretrained(neurons), config).save_pretrained(out)
    console.print(grouped_table(grouped))
    short = sum(found.clusters < (k or 0) for found in grouped.sites.values())
    if short:
        console.print(
            f"{short} of {len(grouped.sites)} projections have too few different rows for {k} groups of two: each is "
            "one group"
        )
    console.print(f"wrote {out}", markup=False)

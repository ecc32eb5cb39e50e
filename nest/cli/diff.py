"""``nest diff``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from nest.cli.app import app, console
from spider_sense.printable import printable

if TYPE_CHECKING:
    from nest.diff import PatchDiff
    from nest.model_diff import ModelDiff

__all__ = ["diff"]

_SHOWN = 12
"""Rows of a projection that the table names."""


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Patch folder, or a model: hub id, folder or .gguf file.")],
    b: Annotated[str, typer.Argument(help="Another one of the same kind.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Show which rows of which projections two patches, or two models, differ in."""
    from nest.diff import PatchDiff, are_patches, diff_patches
    from nest.model_diff import diff_models
    from spider_sense.models import load_model
    from spider_sense.patch import NeuronPatch

    found: PatchDiff | ModelDiff
    if are_patches(a, b):
        found = diff_patches(NeuronPatch.from_pretrained(a), NeuronPatch.from_pretrained(b))
    else:
        found = diff_models(load_model(a), load_model(b))
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif isinstance(found, PatchDiff):
        _show_patches(found)
    else:
        _show_models(found)


def _show_patches(found: "PatchDiff") -> None:
    table = _table(f"Patches {found.a} (a) and {found.b} (b)", ("site", "shared", "only a", "only b"))
    for name in ("norm a", "norm b", "cosine of shared rows"):
        table.add_column(name, justify="right")
    for item in found.sites:
        norms = f"{item.norm_a:.4g}", f"{item.norm_b:.4g}"
        table.add_row(item.site, str(item.shared), str(item.only_a), str(item.only_b), *norms, _number(item.cosine))
    console.print(table)
    counts = [sum(getattr(item, name) for item in found.sites) for name in ("shared", "only_a", "only_b")]
    base = "of one base" if found.same_base else "of different base models"
    typer.echo(
        f"{base}; rows shared {counts[0]}, only in a {counts[1]}, only in b {counts[2]}; cosine of all that they add "
        f"{_number(found.cosine)}"
    )


def _show_models(found: "ModelDiff") -> None:
    table = _table(f"{found.a} (a) and {found.b} (b)", ("site", "rows that differ", "of", "norm of the difference"))
    table.add_column("rows")
    for item in found.projections:
        rows = ", ".join(map(str, item.rows[:_SHOWN])) + ", ..." * (len(item.rows) > _SHOWN)
        table.add_row(item.site, str(len(item.rows)), str(item.of), f"{item.norm:.4g}", rows)
    if found.projections:
        console.print(table)
    changed = sum(len(item.rows) for item in found.projections)
    others = ", ".join(found.others) if found.others else "nothing"
    typer.echo(f"{changed} rows in {len(found.projections)} projections differ; what else differs: {others}")
    if found.dtype_a != found.dtype_b:
        typer.echo(f"a is {found.dtype_a}, b {found.dtype_b}: rounding alone makes rows differ")


def _table(title: str, columns: Sequence[str]) -> Table:
    # Names that came from outside: brackets are no markup in them.
    table = Table(title=Text(printable(title)))
    for name in columns:
        table.add_column(name, justify="left" if name == "site" else "right")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

"""``spider-sense report``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.options import AllowUncertified, Device, Dtype, Model
from spider_sense.cli.progress import progress_bars
from spider_sense.errors import ConfigError

if TYPE_CHECKING:
    from spider_sense.data import Example

__all__ = ["report", "write_page"]


@app.command()
def report(
    guard: Annotated[Path, typer.Argument(help="Guard folder.")],
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to show; repeat it for more.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL file with prompts to show.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows of --data, spread evenly over the file.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 48,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    dtype: Dtype = "float32",
    device: Device = "cpu",
    allow_uncertified: AllowUncertified = False,
) -> None:
    """Write one HTML page: what the guard is worth, and how it reads conversations token by token."""
    from spider_sense.folders import check_file
    from spider_sense.models import load_model
    from spider_sense.reporting import build_report, render

    check_file(out)
    examples, origin = _chosen(prompt or [], data, limit)
    loaded = load_model(model, dtype, device)
    with progress_bars() as progress:
        bar = progress.add_task("Answering prompts", total=len(examples) or None)
        made = build_report(
            guard, loaded, examples, origin, max_new_tokens, allow_uncertified, lambda: progress.advance(bar)
        )
    write_page(render(made), out)
    for line in made.summaries:
        console.print(line, markup=False)
    console.print(f"wrote {out}", markup=False)


def _chosen(prompts: Sequence[str], data: Path | None, limit: int) -> "tuple[list[Example], str]":
    """Return the rows that were asked for, none if nothing was, and where they come from."""
    from spider_sense.data import read_jsonl
    from spider_sense.reporting.assembly import prompt_examples

    rows, origin = prompt_examples(prompts), "Prompts of the command line." if prompts else ""
    if data is not None:
        every = read_jsonl(data, require_label=False)
        picked = every if len(every) <= limit else [every[index * len(every) // limit] for index in range(limit)]
        rows += picked
        origin = f"{origin} {len(picked)} of {len(every)} rows of {data.name}.".strip()
    return rows, origin


def write_page(page: str, out: Path) -> None:
    """Write a page in the place of an older one.

    Raises:
        ConfigError: if it cannot be written.
    """
    # Written beside and renamed: a page that is open in a browser is never half there.
    beside = out.with_name(f".{out.name}.part")
    try:
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another file with --out") from error
    finally:
        beside.unlink(missing_ok=True)

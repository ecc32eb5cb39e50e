"""The typer application, and what happens to an error."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from spider_sense.errors import SpiderSenseError
from spider_sense.printable import printable

__all__ = ["app", "console", "main", "run"]

app = typer.Typer(
    name="spider-sense",
    help="Probes on the hidden activations of a self-hosted language model: train, calibrate, watch, act.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
WIDTH = 200
console = Console(width=None if sys.stdout.isatty() else WIDTH)
"""Where tables go; a file or a pipe gets them uncut."""


def main() -> None:
    """Run the command line."""
    from spider_sense.cli import commands  # noqa: F401  registers the verbs

    run(app)


def run(command: typer.Typer) -> None:
    """Run an application; an error that the library raised on purpose is printed, and the exit code is 2."""
    try:
        command()
    except SpiderSenseError as error:
        message = escape(printable(str(error)))
        Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
        sys.exit(2)

"""The typer application of ``nest``."""

import sys

import typer
from rich.console import Console
from rich.markup import escape

from spider_sense.errors import SpiderSenseError

__all__ = ["app", "console", "main"]

app = typer.Typer(
    name="nest",
    help="Neuron-selective tuning: find safety neurons, tune one shared vector a group, ship the result as a patch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
WIDTH = 200
console = Console(width=None if sys.stdout.isatty() else WIDTH)
"""Where tables go; a file or a pipe gets them uncut."""


def main() -> None:
    """Run the command line; an error that the library raised on purpose is printed, and the exit code is 2."""
    from nest.cli import commands  # noqa: F401  registers the verbs

    try:
        app()
    except SpiderSenseError as error:
        from spider_sense.reporting.pieces import printable

        message = escape(printable(str(error)))
        Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
        sys.exit(2)

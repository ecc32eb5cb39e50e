"""The typer application of ``nest``."""

import typer

from spider_sense.cli.app import console, run

__all__ = ["app", "console", "main"]

app = typer.Typer(
    name="nest",
    help="Neuron-selective tuning: find safety neurons, tune one shared vector a group, ship the result as a patch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    from nest.cli import commands  # noqa: F401  registers the verbs

    run(app)

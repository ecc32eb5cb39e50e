"""``spider-sense sign`` and ``spider-sense verify``."""

from pathlib import Path
from typing import Annotated

import typer

from spider_sense.cli.app import app
from spider_sense.errors import ConfigError

__all__ = ["sign", "verify"]


@app.command()
def sign(
    guard: Annotated[Path | None, typer.Argument(help="Guard folder.")] = None,
    key: Annotated[Path | None, typer.Option(help="Private key, a PEM file.")] = None,
    generate_key: Annotated[
        Path | None,
        typer.Option(metavar="PREFIX", help="Write a new key pair, PREFIX.private.pem and PREFIX.public.pem."),
    ] = None,
) -> None:
    """Sign a guard, so that whoever holds the public key can tell that no file of it was changed."""
    from spider_sense.signing import generate_keys
    from spider_sense.signing import sign as run

    if (key is None) == (generate_key is None):
        raise ConfigError(
            "name the private key with --key, or write a new pair with --generate-key PREFIX, one of them"
        )
    if generate_key is not None:
        key, public = generate_keys(generate_key)
        typer.echo(f"wrote {key}, which nobody else may have, and {public}, to verify with")
    elif guard is None:
        raise ConfigError("there is nothing to sign; run: spider-sense sign GUARD --key PRIVATE.pem")
    if guard is not None:
        assert key is not None
        typer.echo(f"wrote {run(guard, key)}")


@app.command()
def verify(
    guard: Annotated[Path, typer.Argument(help="Guard folder.")],
    key: Annotated[Path, typer.Option(help="Public key of whoever signed it, a PEM file.")],
) -> None:
    """Check that a guard is, file by file, what the owner of a key signed."""
    from spider_sense.signing import verify as run

    run(guard, key)
    typer.echo(f"{guard} is as it was signed")

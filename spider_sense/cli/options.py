"""Options that many verbs have, and values that are one of a closed set."""

from collections.abc import Sequence
from typing import Annotated, TypeVar

import typer

from spider_sense.errors import ConfigError, nearest

__all__ = ["AllowUncertified", "AsJson", "Device", "Dtype", "Model", "choice"]

Model = Annotated[str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
AllowUncertified = Annotated[bool, typer.Option(help="Accept another serving configuration.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")]

ChoiceT = TypeVar("ChoiceT", bound=str)


def choice(value: str, allowed: Sequence[ChoiceT], what: str) -> ChoiceT:
    """Return a command-line value that is one of a closed set.

    Raises:
        ConfigError: if it is not, naming what is.
    """
    found = next((item for item in allowed if item == value), None)
    if found is None:
        raise ConfigError(f"unknown {what} {value!r}; {nearest(value, allowed)}")
    return found

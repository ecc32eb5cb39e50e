"""The store that ``spider-sense principals`` opens, and what is read of it: what is damaged is named and left out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from spider_sense.extraction.artifact import Artifact
    from spider_sense.extraction.clearing import Cleared
    from spider_sense.extraction.decision import Decision
    from spider_sense.extraction.settings import ExtractionSettings
    from spider_sense.extraction.state import PrincipalState
    from spider_sense.extraction.stores import Store

__all__ = ["Config", "Names", "clears_in", "clears_of", "found_in", "opened", "readable", "warn"]

Config = Annotated[Path, typer.Option("--extraction", help="The YAML file that the server watches extraction by.")]
Names = Annotated[list[str], typer.Argument(help="Principals, as the audit log names them.")]


@contextmanager
def opened(config: Path) -> "Iterator[tuple[ExtractionSettings, Artifact, Store]]":
    """Open what a configuration names, for as long as the context lasts."""
    from spider_sense.config import load_yaml
    from spider_sense.extraction.online import open_claimed, read_artifact
    from spider_sense.extraction.settings import ExtractionSettings

    settings = load_yaml(config, ExtractionSettings)
    artifact = read_artifact(settings)
    store = open_claimed(settings, artifact, make=False)
    try:
        yield settings, artifact, store
    finally:
        store.close()


def readable(store: "Store") -> "Iterator[tuple[str, PrincipalState]]":
    """Yield the states; one that is damaged is named and left out, or it would hide what the others did."""
    from spider_sense.errors import StateError
    from spider_sense.extraction.state import PrincipalState

    for name, data in store.principals():
        try:
            yield name, PrincipalState.from_bytes(data)
        except StateError as error:
            typer.echo(f"warning: {name!r} is left out: {error}", err=True)


def found_in(store: "Store") -> "tuple[list[tuple[str, Decision]], dict[str, str]]":
    """Return what was found, by name, and what of it is damaged, as it is kept; the latter is named."""
    from spider_sense.errors import StateError
    from spider_sense.extraction.standing import decision_of

    found, damaged = [], {}
    for name, text in sorted(store.standings()):
        try:
            found.append((name, decision_of(text)))
        except StateError as error:
            damaged[name] = text
            typer.echo(f"warning: {name!r} is left out: {error}", err=True)
    return found, damaged


def clears_in(store: "Store") -> "dict[str, tuple[Cleared, ...]]":
    """Return what was cleared, by name; what of it is damaged clears nothing."""
    from spider_sense.errors import StateError
    from spider_sense.extraction.clearing import cleared_of

    clears = {}
    for name, text in sorted(store.cleared()):
        try:
            clears[name] = cleared_of(text)
        except StateError as error:
            typer.echo(f"warning: {name!r} is cleared of nothing: {error}", err=True)
    return clears


def clears_of(config: Path | None) -> "dict[str, tuple[Cleared, ...]]":
    """Return the same of the store that a configuration names; nothing without one."""
    if config is None:
        return {}
    with opened(config) as (_, _, store):
        return clears_in(store)


def warn(what: str, names: list[str]) -> None:
    """Name those that something is wrong with, if there are any."""
    if names:
        typer.echo(f"warning: {what} {', '.join(map(repr, names))}; write names as the audit log does", err=True)

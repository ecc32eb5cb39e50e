"""``spider-sense principals``: what is kept of those who ask a model, for whoever answers for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.extraction_tables import group_lines, selection_lines
from spider_sense.cli.plain import plain
from spider_sense.errors import ConfigError, StateError

if TYPE_CHECKING:
    from spider_sense.extraction.artifact import Artifact
    from spider_sense.extraction.decision import Decision
    from spider_sense.extraction.settings import ExtractionSettings
    from spider_sense.extraction.state import PrincipalState
    from spider_sense.extraction.stores import Entry, Store

__all__ = ["principals"]

principals = typer.Typer(help="What is kept of those who ask a served model.", no_args_is_help=True)
app.add_typer(principals, name="principals")

Config = Annotated[Path, typer.Option("--extraction", help="The YAML file that the server watches extraction by.")]
Names = Annotated[list[str], typer.Argument(help="Principals, as the audit log names them.")]


@principals.command(name="list")
def list_(config: Config) -> None:
    """Print everybody about whom something was found, a line each."""
    from spider_sense.extraction.decision import LEVELS

    with _opened(config) as (_, _, store):
        about: dict[str, list[Decision]] = {}
        for name, found in _found(store)[0]:
            about.setdefault(name, []).append(found)
        for name, findings in about.items():
            findings.sort(key=lambda found: -LEVELS.index(found.level))
            console.print(plain(f"{name}  {'; also '.join(map(_told, findings))}"), soft_wrap=True)
        console.print(f"{len(store)} principals are kept", highlight=False)


def _told(found: "Decision") -> str:
    when = datetime.fromtimestamp(found.time, UTC).strftime("%Y-%m-%d %H:%M")
    return f"{found.level} by {found.tier}, {when}, request {found.count}: {'; '.join(found.evidence)}"


@principals.command()
def review(config: Config) -> None:
    """Look at linked groups, and select whom to act on; servers hear of it within seconds.

    Where a state is damaged, what was found earlier stands beside what is found now.
    """
    from spider_sense.extraction.keys import Key
    from spider_sense.extraction.review import review as reviewed
    from spider_sense.extraction.standing import strictest, text_of

    with _opened(config) as (settings, artifact, store):
        states = dict(_readable(store))
        unreadable: dict[str, str] = {}
        found = list(reviewed(artifact.detector(Key.read(settings.key)), states))
        lines = [*group_lines(found), *selection_lines(found)]
        if len(states) < len(store):  # Whose group a damaged state belongs to cannot be told.
            kept, unreadable = _found(store)
            found += [decision for _, decision in kept]
        by_name = {one.principal: [other for other in found if other.principal == one.principal] for one in found}
        worst = {name: strictest(decisions) for name, decisions in by_name.items()}
        marks = {name: text_of(decision) for name, decision in worst.items() if decision is not None}
        store.mark_groups(marks | unreadable)
        console.print(f"{len(states)} principals, {len(worst)} found by their groups or in selection", highlight=False)
        for line in lines:
            console.print(plain(line), soft_wrap=True)


def _readable(store: "Store") -> "Iterator[tuple[str, PrincipalState]]":
    """Yield the states; one that is damaged is named and left out, or it would hide what the others did."""
    from spider_sense.extraction.state import PrincipalState

    for name, data in store.principals():
        try:
            yield name, PrincipalState.from_bytes(data)
        except StateError as error:
            typer.echo(f"warning: {name!r} is left out: {error}", err=True)


def _found(store: "Store") -> "tuple[list[tuple[str, Decision]], dict[str, str]]":
    """Return what was found, by name, and what of it is damaged, as it is kept; the latter is named."""
    from spider_sense.extraction.standing import decision_of

    found, damaged = [], {}
    for name, text in sorted(store.standings()):
        try:
            found.append((name, decision_of(text)))
        except StateError as error:
            damaged[name] = text
            typer.echo(f"warning: {name!r} is left out: {error}", err=True)
    return found, damaged


@principals.command()
def clear(config: Config, names: Names) -> None:
    """Take back what was decided. The evidence stays: only a higher level, or a review, can be decided anew."""
    with _opened(config) as (_, _, store):
        found = {name for name, _ in store.standings()}
        _warn("nothing was found about", [name for name in names if name not in found])
        console.print(f"the findings about {store.clear(names)} of {len(names)} principals are gone", highlight=False)


@principals.command()
def link(config: Config, names: Names) -> None:
    """Declare that some principals are one."""
    with _opened(config) as (_, _, store):
        new = [name for name in names if store.read(name) is None]
        if len(set(names)) < 2:
            raise ConfigError(
                f"a link takes two different names, and {names[0]!r} is one; name whom it is one with too"
            )
        store.link(names)
        console.print(f"linked: {', '.join(sorted(store.linked(names[0])))}", highlight=False)
        if new:
            typer.echo(
                f"warning: nothing is kept of {', '.join(map(repr, new))}: if a name is mistyped, take it back with "
                "`spider-sense principals unlink`; a new one is linked from its first request on",
                err=True,
            )


@principals.command()
def unlink(config: Config, names: Names) -> None:
    """Take back that some principals were declared one with others, in their states too."""
    with _opened(config) as (settings, _, store):
        told = sorted({name for party in settings.linked for name in party}.intersection(names))
        if told:
            raise ConfigError(f"{config} links {', '.join(told)}: take them out of `linked`, restart, and unlink again")
        _warn("nobody is linked with", [name for name in names if len(store.linked(name)) < 2])
        count = store.unlink(names)
        for name in names:
            _forget_links(store, name)
        console.print(f"{count} of {len(names)} principals are unlinked", highlight=False)


def _forget_links(store: "Store", name: str) -> None:
    try:
        if store.read(name) is not None:
            # Who is unlinked was not seen by that, and is not kept for longer.
            store.update({name: _undeclared}, seen=0)
    except StateError as error:
        typer.echo(f"warning: {name!r} keeps the link in its state: {error}", err=True)


def _undeclared(entry: "Entry | None") -> "Entry":
    from spider_sense.extraction.state import PrincipalState

    if entry is None:
        raise StateError("it was erased meanwhile")
    return replace(entry, state=PrincipalState.from_bytes(entry.state).undeclared().to_bytes())


@principals.command()
def erase(config: Config, names: Names) -> None:
    """Remove all that is kept of some principals."""
    with _opened(config) as (_, _, store):
        linked = {name for name in names if len(store.linked(name)) > 1}
        _warn("nothing is kept of", [name for name in names if store.read(name) is None and name not in linked])
        console.print(f"{store.erase(names)} of {len(names)} principals are erased", highlight=False)


@principals.command()
def expire(config: Config) -> None:
    """Erase whoever sent nothing for `retention_days`, and vouch for this machine's clock: look at it first."""
    with _opened(config) as (settings, _, store):
        if settings.retention_days is None:
            raise ConfigError(f"{config} keeps everybody for good: `retention_days` is null; give a number of days")
        before = time.time() - settings.retention_days * 86_400
        since = datetime.fromtimestamp(before, UTC).strftime("%Y-%m-%d %H:%M")
        erased, kept = store.expire(before, sure=True), len(store)
        console.print(f"{erased} principals, not seen since {since}, are erased; {kept} are kept", highlight=False)


def _warn(what: str, names: list[str]) -> None:
    if names:
        typer.echo(f"warning: {what} {', '.join(map(repr, names))}; write names as the audit log does", err=True)


@contextmanager
def _opened(config: Path) -> "Iterator[tuple[ExtractionSettings, Artifact, Store]]":
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

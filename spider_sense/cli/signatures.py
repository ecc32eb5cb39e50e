"""``spider-sense signatures``: a bank of signatures, by hand."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from spider_sense.cli.app import app, console
from spider_sense.cli.options import AsJson, Model, choice
from spider_sense.cli.plain import plain
from spider_sense.cli.progress import progress_bars
from spider_sense.errors import ConfigError

if TYPE_CHECKING:
    from spider_sense.models import LoadedModel
    from spider_sense.screening.signature_bank import SignatureBank

__all__ = ["signatures"]

signatures = typer.Typer(help="Signatures of attacks and look-alikes in activation space.", no_args_is_help=True)
app.add_typer(signatures, name="signatures")

Bank = Annotated[Path, typer.Argument(help="Folder of the bank.")]
StageName = Annotated[
    str, typer.Option("--stage", help="query, plan, action or observation: where the texts are seen.")
]


@signatures.command()
def add(
    bank: Bank,
    name: Annotated[str, typer.Option("--id", help="Letters, digits, _ . and -.")],
    kind: Annotated[str, typer.Option(help="misuse, injection, extraction or benign (a look-alike).")],
    examples: Annotated[Path, typer.Option(help="JSONL file with a handful of rows with text.")],
    provenance: Annotated[str, typer.Option(help="Who made it and from what; it is shown and exported.")],
    stage: StageName = "observation",
    model: Model = "smollm2",
    site: Annotated[str | None, typer.Option(help="Of a new bank, such as resid.20; by default two thirds up.")] = None,
    traffic: Annotated[
        list[Path] | None, typer.Option(help="JSONL files with benign rows, and attacks; a new bank needs them.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Of a new bank: largest share of benign spans to fire on.")] = 0.01,
    radius: Annotated[float | None, typer.Option(help="Cosine distance; by default as the traffic allows.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a signature with the same id.")] = False,
) -> None:
    """Make a signature of a handful of examples, after a trial on benign traffic; the first one makes the bank."""
    from spider_sense.data import read_jsonl
    from spider_sense.models import load_model
    from spider_sense.screening.bank_making import model_pool, traffic_of, with_traffic
    from spider_sense.screening.signature import KINDS
    from spider_sense.screening.signature_draft import draft
    from spider_sense.screening.stage import STAGES

    rows = read_jsonl(examples, require_label=False)
    chosen, where = choice(kind, KINDS, "kind"), choice(stage, STAGES, "stage")
    loaded = load_model(model)
    with progress_bars() as progress:
        advance = functools.partial(progress.advance, progress.add_task("Reading texts", total=None))
        held = _opened(bank, loaded, site, budget, traffic is not None, advance)
        there = [item.about.id for item in held.signatures if item.about.id == name]
        if there and not replace:
            raise ConfigError(f"{bank} has a signature {name!r}; choose another --id, or take its place with --replace")
        pool = model_pool(loaded, held.site, where, advance)
        held = held.without(there)
        if traffic is not None:
            old = held.traffic
            held = with_traffic(held, traffic_of(held, [row for file in traffic for row in read_jsonl(file)], pool))
            # It took minutes to read, and the signature may yet be refused; one that is to be replaced then stays.
            if not there:
                held.save_pretrained(bank)
            typer.echo(f"traffic: {held.traffic}" + (f", in place of {old}" if old else ""))
        held, into = held.added(draft(held, name, chosen, pool([row.text for row in rows]), provenance, radius))
    held.save_pretrained(bank)
    about = next(item.about for item in held.signatures if item.about.id == into)
    merged = "" if into == name else f"; it is a near-duplicate of {into} and was merged with it"
    trial = about.trial
    assert trial is not None, "a signature that was added has been tried"
    typer.echo(f"{into}: radius {about.radius:.2f}, fires on {trial.fired} of {trial.benign} benign{merged}")


@signatures.command(name="list")
def list_(bank: Bank, as_json: AsJson = False) -> None:
    """Show what is in a bank."""
    held = _read(bank)
    if as_json:
        records = [item.about.model_dump(mode="json") for item in held.signatures]
        typer.echo(json.dumps({"site": str(held.site), "budget": held.budget, "signatures": records}))
        return
    table = Table(title=plain(f"{bank}: {len(held.signatures)} signatures at {held.site}"), box=box.SIMPLE_HEAD)
    for column in ("id", "kind", "radius", "examples", "benign fired", "made", "provenance"):
        table.add_column(column)
    for item in held.signatures:
        about, trial = item.about, item.about.trial
        fired = f"{trial.fired} of {trial.benign}" if trial else "not tried"
        cells = (about.id, about.kind, f"{about.radius:.2f}", str(about.examples), fired, about.created)
        table.add_row(*map(plain, (*cells, about.provenance)))
    console.print(table)


@signatures.command()
def remove(bank: Bank, ids: Annotated[list[str], typer.Argument(help="Signatures.")]) -> None:
    """Take signatures out of a bank."""
    _read(bank).without(ids).save_pretrained(bank)
    typer.echo(f"removed {', '.join(ids)}")


@signatures.command()
def search(
    bank: Bank,
    text: Annotated[list[str], typer.Option(help="Text to look for; repeat it for more.")],
    stage: StageName = "observation",
    model: Model = "smollm2",
    as_json: AsJson = False,
) -> None:
    """Show which signature of an attack, and which look-alike, is nearest to a text, and whether it fires."""
    from spider_sense.models import load_model
    from spider_sense.screening.bank_making import model_pool, open_bank
    from spider_sense.screening.stage import STAGES

    where = choice(stage, STAGES, "stage")
    loaded = load_model(model)
    held = open_bank(bank, loaded)
    pooled_TD = model_pool(loaded, held.site, where)(text)
    pairs = [
        (words, held.nearest(row_D, benign))
        for words, row_D in zip(text, pooled_TD, strict=True)
        for benign in (False, True)
    ]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("text", "nearest", "kind", "distance", "radius", "fires"):
        table.add_column(column)
    for words, match in pairs:
        if match is not None:
            cells = (
                match.id,
                match.kind,
                f"{1 - match.cosine:.3f}",
                f"{match.radius:.2f}",
                "yes" if match.fires else "no",
            )
            table.add_row(*map(plain, (words[:40], *cells)))
    console.print(table)
    if as_json:
        found = [asdict(match) | {"text": text.index(words), "fires": match.fires} for words, match in pairs if match]
        typer.echo(json.dumps(found))


@signatures.command(name="export")
def export_(
    bank: Bank,
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    key: Annotated[Path, typer.Option(help="Private key, a PEM file; `spider-sense sign --generate-key` makes one.")],
    ids: Annotated[list[str] | None, typer.Option("--id", help="Which; by default all.")] = None,
) -> None:
    """Write signatures, without any text or traffic, to a signed folder that can be given away."""
    from spider_sense.screening.exchange import export_signatures

    count = export_signatures(_read(bank), folder, key, ids or ())
    typer.echo(f"wrote {count} signatures to {folder}, signed")


@signatures.command(name="import")
def import_(
    bank: Bank,
    folder: Annotated[Path, typer.Argument(help="What another operator exported.")],
    key: Annotated[Path, typer.Option(help="Public key of that operator, a PEM file.")],
) -> None:
    """Take in another operator's signatures, each after a trial on this bank's traffic; 1 if one was refused."""
    from spider_sense.screening.exchange import import_signatures

    held, results = import_signatures(_read(bank), folder, key)
    held.save_pretrained(bank)
    for item in results:
        typer.echo(f"took {item.id}" if item.refused is None else f"refused {item.refused}")
    if any(item.refused is not None for item in results):
        raise typer.Exit(1)


def _read(bank: Path) -> "SignatureBank":
    from spider_sense.screening.signature_bank import SignatureBank

    return SignatureBank.from_pretrained(bank)


def _opened(
    bank: Path, loaded: "LoadedModel", site: str | None, budget: float, traffic: bool, advance: Callable[[int], None]
) -> "SignatureBank":
    """Return the bank, a new one if there is none yet."""
    from spider_sense.fingerprint import fingerprint
    from spider_sense.screening.bank_making import model_pool, new_bank, open_bank
    from spider_sense.screening.signature_bank import KIND
    from spider_sense.types import Site

    KIND.check_replaceable(bank)
    if (bank / KIND.manifest).is_file():
        return open_bank(bank, loaded)
    if not traffic:
        raise ConfigError(f"{bank} is no bank yet; name benign rows to try signatures on, with --traffic FILE.jsonl")
    if not 0 < budget < 0.5:
        raise ConfigError(f"--budget {budget} is not allowed; choose a share above 0 and below 0.5, such as 0.01")
    made_for = fingerprint(loaded)
    chosen = Site.parse(site or f"resid.{2 * made_for.layers // 3}")
    return new_bank(made_for, chosen, budget, model_pool(loaded, chosen, "query", advance))

"""``spider-sense extraction``: who is distilling this model."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from spider_sense.cli.app import app, console
from spider_sense.cli.report import write_page
from spider_sense.cli.tables import plain
from spider_sense.cli.train import progress_bars
from spider_sense.errors import ConfigError

if TYPE_CHECKING:
    from spider_sense.extraction.artifact import Artifact
    from spider_sense.extraction.encode import Read
    from spider_sense.extraction.keys import Key
    from spider_sense.extraction.rows import Row
    from spider_sense.extraction.ruling import Ruling
    from spider_sense.extraction.tiers import TieredDetector
    from spider_sense.models import LoadedModel
    from spider_sense.types import Site

__all__ = ["extraction"]

extraction = typer.Typer(help="Find accounts, and linked accounts, that mine the model to train another.")
app.add_typer(extraction, name="extraction", no_args_is_help=True)

GuardFolder = Annotated[Path, typer.Argument(help="Folder that `extraction fit` wrote.")]
Logs = Annotated[list[Path], typer.Option(help="JSONL log of requests; repeat for others.")]
KeyFile = Annotated[Path, typer.Option(help="File with the secret that hashes are made with.")]
Model = Annotated[str | None, typer.Option(help="Reads the rows with text; leave it out if all have activations.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


@extraction.command()
def fit(
    benign: Annotated[list[Path], typer.Option(help="JSONL log of honest principals; repeat for others.")],
    campaigns: Annotated[list[Path], typer.Option(help="JSONL log of campaigns, each row with a family.")],
    key: Annotated[Path, typer.Option(help="File with the secret that hashes are made with; a new one is made.")],
    out: Annotated[Path, typer.Option(help="Where to write the extraction guard.")],
    model: Model = None,
    site: Annotated[str, typer.Option(help="Where the hidden state is read.")] = "resid.18",
    known_list: Annotated[
        list[Path] | None, typer.Option(help="JSONL of a query list known to be distilled with; repeat for others.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Fit sketch, probes and population; calibrate it afterwards, on other principals."""
    from spider_sense.data import read_jsonl
    from spider_sense.extraction.artifact import KIND
    from spider_sense.extraction.fitting import fit as run
    from spider_sense.extraction.keys import Key
    from spider_sense.fingerprint import fingerprint
    from spider_sense.types import Site

    KIND.check_replaceable(out)
    where = Site.parse(site)
    honest, hostile = _read(benign), _read(campaigns)
    lists = {path.stem: [row.text for row in read_jsonl(path, require_label=False)] for path in known_list or []}
    loaded = _load(model, dtype, device)
    secret = Key.read(key) if key.exists() else Key.create(key)
    artifact = run(
        honest,
        hostile,
        secret,
        where,
        width=_width(honest, loaded),
        read=_reader(loaded, where, [*honest, *hostile]),
        base=None if loaded is None else fingerprint(loaded),
        lists=lists,
    ).save_pretrained(out)
    reached = ", ".join(map(str, artifact.population.levels))
    typer.echo(
        f"fitted on {artifact.population.principals} honest principals; probes {', '.join(artifact.sketch.names)}; "
        f"level models at {reached} requests; wrote {out}. Calibrate it on other principals next"
    )


@extraction.command()
def calibrate(
    guard: GuardFolder,
    benign: Annotated[list[Path], typer.Option(help="JSONL log of honest principals that the fit did not see.")],
    key: KeyFile,
    model: Model = None,
    own: Annotated[float, typer.Option(help="Share of honest principals that own history may ever alarm.")] = 0.006,
    level: Annotated[float, typer.Option(help="The same for the level.")] = 0.004,
    group: Annotated[float, typer.Option(help="Share of honest linked groups that may be limited.")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="Where to write it; by default it is replaced.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Set the thresholds on your own honest principals."""
    from spider_sense.config import parse
    from spider_sense.extraction.artifact import KIND
    from spider_sense.extraction.fitting import calibrate as run
    from spider_sense.extraction.thresholds import Budget

    KIND.check_replaceable(out or guard)
    budget = parse({"own": own, "level": level, "group": group}, Budget, "the budget")
    artifact, secret, rows, read = _opened(guard, key, benign, model, dtype, device)
    done = run(artifact, rows, secret, read=read, budget=budget).save_pretrained(out or guard)
    console.print(_thresholds(done))
    _warn(done)
    typer.echo(f"wrote {out or guard}")


@extraction.command()
def score(
    guard: GuardFolder,
    data: Logs,
    key: KeyFile,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every decision as a line of JSON instead.")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Judge a log: whom to watch, limit or act on, and why."""
    _, _, ruling = _ruling(guard, data, key, model, dtype, device)
    if as_json:
        for decision in ruling.decisions:
            typer.echo(json.dumps(asdict(decision)))
        return
    console.print(_decisions(ruling))
    counts = Counter(decision.level for decision in ruling.worst().values())
    typer.echo(
        f"{len(ruling.states)} principals: {counts['act']} to act on, {counts['limit']} to limit, "
        f"{counts['watch']} to watch; {len(ruling.groups)} linked groups"
    )


@extraction.command()
def report(
    guard: GuardFolder,
    data: Logs,
    key: KeyFile,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("extraction.html"),
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Write one HTML page: timelines, evidence, linked groups, thresholds."""
    from spider_sense.reporting.extraction_page import render_extraction

    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out.absolute().parent} does not exist; make it, or write the page elsewhere with --out")
    artifact, detector, ruling = _ruling(guard, data, key, model, dtype, device)
    write_page(render_extraction(artifact, detector, ruling, f"{', '.join(path.name for path in data)}:"), out)
    console.print(f"wrote {out}", markup=False)


def _ruling(
    guard: Path, data: list[Path], key: Path, model: str | None, dtype: str, device: str
) -> "tuple[Artifact, TieredDetector, Ruling]":
    from spider_sense.extraction.fitting import events_of
    from spider_sense.extraction.ruling import judge

    artifact, secret, rows, read = _opened(guard, key, data, model, dtype, device)
    detector = artifact.detector(secret)
    if artifact.calibration is None:
        typer.echo("warning: not calibrated, so nothing but the rules is more than watched", err=True)
    return artifact, detector, judge(detector, events_of(artifact, rows, secret, read))


def _opened(
    guard: Path, key: Path, data: list[Path], model: str | None, dtype: str, device: str
) -> "tuple[Artifact, Key, list[Row], Read | None]":
    from spider_sense.extraction.artifact import Artifact
    from spider_sense.extraction.keys import Key
    from spider_sense.fingerprint import fingerprint

    artifact, secret, rows = Artifact.from_pretrained(guard), Key.read(key), _read(data)
    artifact.check_key(secret)
    loaded = _load(model, dtype, device)
    if loaded is not None:
        artifact.check_model(fingerprint(loaded))
    unread = 0 if loaded is not None else sum(row.hidden is None and row.sketch is None for row in rows)
    if unread:
        typer.echo(
            f"warning: {unread} of {len(rows)} requests have no activations and no model reads them; "
            "only the rules and the counters see those",
            err=True,
        )
    return artifact, secret, rows, _reader(loaded, artifact.site, rows)


def _read(paths: list[Path]) -> "list[Row]":
    from spider_sense.extraction.rows import read_rows

    return [row for path in paths for row in read_rows(path)]


def _load(model: str | None, dtype: str, device: str) -> "LoadedModel | None":
    from spider_sense.models import load_model

    return None if model is None else load_model(model, dtype, device)


def _reader(loaded: "LoadedModel | None", site: "Site", rows: "list[Row]") -> "Read | None":
    if loaded is None:
        return None
    from spider_sense.cli.model_reader import ModelReader

    reader = ModelReader(loaded, site, _shown)
    reader.check(rows)
    return reader


@contextmanager
def _shown(total: int) -> Iterator[Callable[[int], None]]:
    with progress_bars() as progress:
        bar = progress.add_task("Reading prompts", total=total)
        yield lambda count: progress.advance(bar, count)


def _width(rows: "list[Row]", loaded: "LoadedModel | None") -> int:
    if loaded is not None:
        return int(loaded.model.config.get_text_config().hidden_size)
    width = next((len(row.hidden) for row in rows if row.hidden is not None), None)
    if width is None:
        raise ConfigError("no row has a hidden state; name a model that reads their text with --model")
    return width


def _thresholds(artifact: "Artifact") -> Table:
    table = Table(title="Thresholds over principals", box=box.SIMPLE_HEAD)
    for name in ("tier", "stratum", "principals", "requests", "share ever limited", "threshold", ""):
        table.add_column(name, no_wrap=True)
    calibration = artifact.calibration
    assert calibration is not None
    for tier, maxima in calibration.maxima.items():
        for stratum, values in maxima.items():
            table.add_row(
                tier,
                plain(stratum or "everybody"),
                str(len(values)),
                "" if tier == "group" else str(calibration.horizons.get(stratum, "")),
                f"{calibration.budget.share(tier):.2%}",
                f"{calibration.threshold(tier, stratum):.2f}",
                "" if calibration.certified(tier, stratum) else "uncertified",
            )
    return table


def _warn(artifact: "Artifact") -> None:
    from spider_sense.extraction.thresholds import CERTIFIED, EVERYBODY

    calibration = artifact.calibration
    assert calibration is not None
    weak = [tier for tier in calibration.maxima if not calibration.certified(tier, EVERYBODY)]
    if weak:
        found = ", ".join(f"{tier} on {len(calibration.maxima[tier][EVERYBODY])}" for tier in weak)
        typer.echo(
            f"warning: uncertified: {found}; {CERTIFIED} honest principals (for groups: honest linked groups) are "
            "needed. An infinite threshold never limits anybody",
            err=True,
        )


def _decisions(ruling: "Ruling") -> Table:
    table = Table(title="Findings, the highest of each principal", box=box.SIMPLE_HEAD)
    for name in ("principal", "level", "tier", "at request", "p"):
        table.add_column(name, no_wrap=True)
    table.add_column("evidence", overflow="fold")
    for name, decision in ruling.worst().items():
        p_value = "" if decision.p_value is None else f"{decision.p_value:.2g}"
        words = plain("; ".join(decision.evidence))
        table.add_row(plain(name), decision.level, decision.tier, str(decision.count), p_value, words)
    return table

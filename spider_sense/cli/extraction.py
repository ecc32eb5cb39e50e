"""``spider-sense extraction``: who is distilling this model."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.extraction_log import Reading, log_width, open_log, read_logs, reader_of
from spider_sense.cli.extraction_tables import findings_table, group_lines, limits_table, warn_of_limits, warn_of_links
from spider_sense.cli.options import Device, Dtype
from spider_sense.cli.plain import plain
from spider_sense.cli.report import write_page
from spider_sense.errors import ConfigError

if TYPE_CHECKING:
    from spider_sense.extraction.artifact import Artifact
    from spider_sense.extraction.lists import KnownLists
    from spider_sense.extraction.ruling import Ruling
    from spider_sense.extraction.tiers import TieredDetector

__all__ = ["extraction"]

extraction = typer.Typer(help="Find accounts, and linked accounts, that mine the model to train another.")
app.add_typer(extraction, name="extraction", no_args_is_help=True)

GuardFolder = Annotated[Path, typer.Argument(help="Folder that `extraction fit` wrote.")]
Logs = Annotated[list[Path], typer.Option(help="JSONL log of requests; repeat for others.")]
ReadingModel = Annotated[
    str | None, typer.Option(help="Reads the rows with text; leave it out if all have activations.")
]
KeyFile = Annotated[Path, typer.Option(help="File with the secret that hashes are made with.")]


@extraction.command()
def fit(
    benign: Annotated[list[Path], typer.Option(help="JSONL log of honest principals; repeat for others.")],
    campaigns: Annotated[list[Path], typer.Option(help="JSONL log of campaigns, each row with a family.")],
    key: Annotated[Path, typer.Option(help="File with the secret that hashes are made with; a new one is made.")],
    out: Annotated[Path, typer.Option(help="Where to write the extraction guard.")],
    model: ReadingModel = None,
    site: Annotated[str, typer.Option(help="Where the hidden state is read.")] = "resid.18",
    known_list: Annotated[
        list[Path] | None, typer.Option(help="JSONL of a query list known to be distilled with; repeat for others.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Fit sketch, probes and population; calibrate it afterwards, on other principals."""
    from spider_sense.extraction.artifact import KIND
    from spider_sense.extraction.checks import check_fit
    from spider_sense.extraction.fitting import fit as run
    from spider_sense.extraction.keys import Key
    from spider_sense.fingerprint import fingerprint
    from spider_sense.types import Site

    KIND.check_replaceable(out)
    both = sorted(str(path) for path in benign if path.resolve() in {other.resolve() for other in campaigns})
    if both:
        raise ConfigError(f"{', '.join(both)} stands in --benign and in --campaigns; give each log to one of them")
    where, reading = Site.parse(site), Reading(model, dtype, device)
    reading.check(where)
    honest, hostile, lists = read_logs(benign), read_logs(campaigns), _lists(known_list or [])
    check_fit(honest, hostile, reads=model is not None)
    if key.exists():
        secret = Key.read(key)
    else:
        secret = Key.create(key)
        typer.echo(f"made a new key, {key}; keep it: calibrate, score and serve need it")
    loaded = reading.load()
    artifact = run(
        honest,
        hostile,
        secret,
        where,
        width=log_width(honest, loaded),
        read=reader_of(loaded, where, [*honest, *hostile]),
        base=None if loaded is None else fingerprint(loaded),
        lists=lists,
    ).save_pretrained(out)
    reached = ", ".join(map(str, artifact.population.levels))
    typer.echo(
        f"fitted on {artifact.population.principals} honest principals; probes {', '.join(artifact.sketch.names)}; "
        f"level models at {reached} requests; wrote {out}. Calibrate it on other principals next"
    )
    warn_of_links(artifact.population, honest)


def _lists(paths: list[Path]) -> "KnownLists | None":
    from spider_sense.data import read_jsonl
    from spider_sense.extraction.lists import KnownLists

    texts = {path.stem: [row.text for row in read_jsonl(path, require_label=False)] for path in paths}
    return KnownLists.build(texts) if texts else None


@extraction.command()
def calibrate(
    guard: GuardFolder,
    benign: Annotated[list[Path], typer.Option(help="JSONL log of honest principals that the fit did not see.")],
    key: KeyFile,
    model: ReadingModel = None,
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
    from spider_sense.extraction.checks import check_calibration
    from spider_sense.extraction.fitting import calibrate as run
    from spider_sense.extraction.thresholds import Budget

    KIND.check_replaceable(out or guard)
    budget = parse({"own": own, "level": level, "group": group}, Budget, "the budget")
    opened = open_log(guard, key, benign, Reading(model, dtype, device))
    check_calibration(opened.artifact, opened.rows, opened.key, reads=model is not None)
    done = run(opened.artifact, opened.rows, opened.key, read=opened.reader(), budget=budget)
    assert done.calibration is not None
    done.save_pretrained(out or guard)
    console.print(limits_table(done.calibration, done.population))
    warn_of_limits(done.calibration, done.population)
    warn_of_links(done.population, opened.rows)
    typer.echo(f"wrote {out or guard}")


@extraction.command()
def score(
    guard: GuardFolder,
    data: Logs,
    key: KeyFile,
    model: ReadingModel = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every decision as a line of JSON instead.")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Judge a log: whom to watch, limit or act on, and why."""
    _, _, ruling = _ruling(guard, data, key, Reading(model, dtype, device))
    if as_json:
        for decision in ruling.decisions:
            typer.echo(json.dumps(asdict(decision)))
        return
    console.print(findings_table(ruling))
    for line in group_lines(ruling.decisions):
        console.print(plain(line), soft_wrap=True)
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
    model: ReadingModel = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("extraction.html"),
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Write one HTML page: timelines, evidence, linked groups, thresholds."""
    from spider_sense.extraction.checks import check_installed
    from spider_sense.folders import check_file
    from spider_sense.reporting.extraction_page import render_extraction

    check_installed("extraction", "matplotlib")
    check_file(out)
    artifact, detector, ruling = _ruling(guard, data, key, Reading(model, dtype, device))
    write_page(render_extraction(artifact, detector, ruling, f"{', '.join(path.name for path in data)}:"), out)
    console.print(f"wrote {out}", markup=False)


def _ruling(guard: Path, data: list[Path], key: Path, reading: Reading) -> "tuple[Artifact, TieredDetector, Ruling]":
    from spider_sense.extraction.fitting import events_of
    from spider_sense.extraction.ruling import judge

    opened = open_log(guard, key, data, reading)
    artifact, detector = opened.artifact, opened.artifact.detector(opened.key)
    if artifact.calibration is None:
        typer.echo("warning: not calibrated, so nothing but the rules is more than watched", err=True)
    return artifact, detector, judge(detector, events_of(artifact, opened.rows, opened.key, opened.reader()))

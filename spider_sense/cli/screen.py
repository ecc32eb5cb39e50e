"""``spider-sense screen``: recorded conversations of agents through model and cascade."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from spider_sense.cli.app import app, console
from spider_sense.cli.options import AsJson, Device, Dtype, Model
from spider_sense.cli.plain import plain
from spider_sense.cli.progress import progress_bars

if TYPE_CHECKING:
    from spider_sense.screening.trace import Trace
    from spider_sense.screening.verdict import Screening, StageVerdict

__all__ = ["screen"]


@app.command()
def screen(
    trace: Annotated[Path, typer.Option(help="JSON lines, each a conversation with messages in OpenAI's format.")],
    model: Model = "smollm2",
    stages: Annotated[
        Path | None, typer.Option(help="Folder of the stages' probes; else every span is suspect.")
    ] = None,
    signatures: Annotated[Path | None, typer.Option(help="Folder of a bank of signatures.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file, such as configs/screen.yaml.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a JSON line for each span, without its text.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Screen recorded conversations: what was sensed, what was asked of the judge, what was decided and why."""
    from spider_sense.config import load_yaml
    from spider_sense.folders import check_file
    from spider_sense.models import load_model
    from spider_sense.screening.opening import open_screen
    from spider_sense.screening.reader import ChatSpans
    from spider_sense.screening.settings import ScreenSettings
    from spider_sense.screening.tally import tally
    from spider_sense.screening.trace import read_traces
    from spider_sense.screening.written_calls import ReplayReader

    if out is not None:
        check_file(out, renamed=False)
    settings = load_yaml(config, ScreenSettings) if config else ScreenSettings()
    # Read whole before the model is loaded: a bad line in the last place shows at once.
    traces = list(read_traces(trace))
    loaded = load_model(model, dtype, device)
    reader = ReplayReader(ChatSpans(loaded.tokenizer))
    if reader.writes:
        console.print("the chat template leaves tool calls out, so they are put into the text as the model writes them")
    with open_screen(settings, loaded, stages, signatures, reader) as screen_, progress_bars() as progress:
        screenings = [
            (item.id, screen_.check(item.messages, item.tools, item.principal))
            for item in progress.track(traces, description="Screening")
        ]
    counts = tally(screening for _, screening in screenings)
    if counts["raised"]:
        console.print(_table(screenings))
    if out is not None:
        lines = [json.dumps(_record(name, verdict)) for name, item in screenings for verdict in item.verdicts]
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    console.print(
        f"{counts['raised']} of {counts['conversations']} conversations raised; "
        f"the judge was asked about {counts['escalated']} of {counts['spans']} spans"
    )
    # Where known tools are listed, a rule for none of them has been refused.
    unsure = settings.tools if settings.tools and settings.tools.known is None else None
    for number, rule in unsure.idle(_tools(traces)) if unsure else ():
        console.print(
            f"rule {number} is for {rule.tool!r}, which no conversation offers or calls; if it is mistyped it guards "
            "nothing: list your tools as tools.known, and a rule for none of them is an error",
            markup=False,
        )
    if as_json:
        typer.echo(json.dumps(counts))


def _tools(traces: "Sequence[Trace]") -> set[str]:
    """Return the tools that conversations offer or call."""
    from spider_sense.screening.screen import tool_name

    offered = {tool_name(tool) for trace in traces for tool in trace.tools or ()}
    return offered | {call.name for trace in traces for message in trace.messages for call in message.tool_calls}


def _table(screenings: "Sequence[tuple[str, Screening]]") -> Table:
    table = Table(title="What was raised", box=box.SIMPLE_HEAD)
    for column in ("conversation", "message", "stage", "sensed", "outcome", "decided by", "evidence"):
        table.add_column(column, overflow="fold")
    for name, screening in screenings:
        for verdict in screening.raised:
            table.add_row(plain(name), *map(plain, _cells(verdict)))
    return table


def _cells(verdict: "StageVerdict") -> tuple[str, ...]:
    place = verdict.artifact.span.message
    outcome = f"{verdict.outcome}, flagged" if verdict.flagged else verdict.outcome
    if verdict.needs_human:
        outcome += " until a person agrees"
    where = "-" if place is None else str(place)
    return where, verdict.stage, verdict.zone, outcome, verdict.decided_by, verdict.evidence


def _record(name: str, verdict: "StageVerdict") -> dict[str, Any]:
    span = verdict.artifact.span
    return {
        "conversation": name,
        "principal": verdict.artifact.principal,
        "sender": verdict.artifact.sender,
        "message": span.message,
        "call": span.call,
        "tool": span.tool,
        "tokens": [span.start, span.stop],
        "stage": verdict.stage,
        "zone": verdict.zone,
        "outcome": verdict.outcome,
        "decided_by": verdict.decided_by,
        "evidence": verdict.evidence,
        "flagged": verdict.flagged,
        "needs_human": verdict.needs_human,
        "signature": verdict.match.id if verdict.match else None,
        "judged": verdict.answer is not None,
        "seconds": verdict.seconds,
    }

"""``spider-sense generate``: one guarded generation, its tokens coloured by the running score."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from spider_sense.cli.app import app, console
from spider_sense.cli.options import AsJson, Device, Dtype, Model
from spider_sense.types import ZONES

if TYPE_CHECKING:
    from spider_sense.case import Case

__all__ = ["generate"]


@app.command()
def generate(
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    prompt: Annotated[str, typer.Option(help="The user's turn.")],
    model: Model = "smollm2",
    policy: Annotated[Path | None, typer.Option(help="Policy YAML; by default breaches are stopped.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 96,
    audit: Annotated[Path | None, typer.Option(help="Append events to this JSON-lines file.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Generate under a guard and print the verdict."""
    import torch

    from spider_sense.audit import AuditLog
    from spider_sense.chat import Chat
    from spider_sense.cli.coloured_stream import ColouredStream
    from spider_sense.config import load_yaml
    from spider_sense.guard import Guard
    from spider_sense.models import load_model
    from spider_sense.monitor import Monitor
    from spider_sense.policy import Policy

    chosen = load_yaml(policy, Policy) if policy else Policy.default()
    read = Guard.from_pretrained(guard)
    loaded = load_model(model, dtype, device)
    ids = torch.tensor([Chat(loaded.tokenizer).render(prompt).ids], device=loaded.model.device)
    stream = ColouredStream(loaded.tokenizer, ids.shape[1], console)
    log = AuditLog(audit) if audit else None
    monitor = Monitor(read, chosen, keep_history=True, audit=log, on_step=stream.step)
    with monitor.attach(loaded.model, loaded.tokenizer):
        output = loaded.model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, streamer=stream)
    case = monitor.cases[0]
    console.print(verdict_table(case))
    if as_json:
        text = loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        said = {"text": text, "action": case.decision.action, "zone": _worst(case), "patched_from": case.patched_from}
        typer.echo(json.dumps(said))


def verdict_table(case: "Case") -> Table:
    """Return the final verdict of each detector and what was done."""
    patched = "" if case.patched_from is None else f"; patched from token {case.patched_from} on"
    table = Table(title=f"{case.decision.action}: {case.decision.reason}{patched}")
    for name in ("detector", "zone", "score", "breach at", "position", "tokens scored", "missing"):
        table.add_column(name)
    for verdict in case.verdicts:
        coverage = verdict.coverage
        table.add_row(
            verdict.detector,
            verdict.zone,
            f"{verdict.score:.3f}",
            f"{verdict.threshold:.3f}",
            str(verdict.position),
            str(coverage.scored),
            str(coverage.missing),
        )
    return table


def _worst(case: "Case") -> str:
    return max((verdict.zone for verdict in case.verdicts), key=ZONES.index)

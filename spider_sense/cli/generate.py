"""``spider-sense generate``: one guarded generation, its tokens coloured by the running score."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from spider_sense.audit import AuditLog
from spider_sense.case import Case
from spider_sense.cli.app import app, console
from spider_sense.cli.tables import plain
from spider_sense.config import load_yaml
from spider_sense.guard import Guard
from spider_sense.policy import Policy
from spider_sense.types import ZONES

__all__ = ["ColouredStream", "generate"]


class ColouredStream(BaseStreamer):  # type: ignore[misc]
    """Prints each generated token once its score is known: green, yellow from suspect on, red from breach on.

    Args:
        tokenizer: decodes the tokens.
        prompt: tokens of the prompt, which are not printed.
        out: where to print.
    """

    def __init__(self, tokenizer: Any, prompt: int, out: Console) -> None:
        self._tokenizer, self._out = tokenizer, out
        self._skip, self._ids, self._printed = prompt, list[int](), 0

    def put(self, value: Any) -> None:
        """Take the prompt, then one token at a time."""
        self._ids += value.flatten().tolist()

    def end(self) -> None:
        """Print what has no score of its own: a refusal, and the last token, which never passes through the model."""
        self._print(len(self._ids) - self._skip, "dim")
        self._out.print()

    def step(self, cases: Sequence[Case]) -> None:
        """Print the tokens up to the position that the reading includes."""
        for case in cases:
            readout = case.history[-1][1] if case.history else 0.0
            self._print(case.position + 1 - self._skip, colour(readout, *case.thresholds[:, 0].tolist()))

    def _print(self, upto: int, style: str) -> None:
        tokens = self._ids[self._skip + self._printed : self._skip + upto]
        if tokens:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            self._out.print(plain(text, style), end="", soft_wrap=True)
            self._printed += len(tokens)


def colour(readout: float, suspect: float, breach: float) -> str:
    """Return a rich style for a running score: green below, yellow from the suspect threshold, bold red from breach."""
    if not readout < breach:
        return "bold red"
    return "yellow" if not readout < suspect else "green"


@app.command()
def generate(
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    prompt: Annotated[str, typer.Option(help="The user's turn.")],
    model: Annotated[
        str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")
    ] = "smollm2",
    policy: Annotated[Path | None, typer.Option(help="Policy YAML; by default breaches are stopped.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 96,
    audit: Annotated[Path | None, typer.Option(help="Append events to this JSON-lines file.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Generate under a guard and print the verdict."""
    import torch

    from spider_sense.chat import Chat
    from spider_sense.models import load_model
    from spider_sense.monitor import Monitor

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


def verdict_table(case: Case) -> Table:
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


def _worst(case: Case) -> str:
    return max((verdict.zone for verdict in case.verdicts), key=ZONES.index)

"""``spider-sense calibrate``."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.tables import thresholds_table
from spider_sense.cli.train import progress_bars

if TYPE_CHECKING:
    from spider_sense.calibration import Calibration

__all__ = ["calibrate"]


@app.command()
def calibrate(
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; smollm2 is the packaged model.")],
    data: Annotated[list[Path], typer.Option(help="JSONL files of benign traffic; repeat or list them.")],
    more: Annotated[list[Path] | None, typer.Argument(help="Further JSONL files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the guard; by default it is replaced.")] = None,
    respond: Annotated[int, typer.Option(min=0, help="Tokens of response to each prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=32, help="Longer prompts are cut in the middle.")] = 2048,
    suspect_fpr: Annotated[float, typer.Option(help="Share of benign traffic that may be suspect.")] = 0.05,
    breach_fpr: Annotated[float, typer.Option(help="Share of benign traffic that may be a breach.")] = 0.01,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    work: Annotated[Path | None, typer.Option(help="Keep captured activations here, and resume from them.")] = None,
) -> None:
    """Set a guard's thresholds on your own benign traffic, in the configuration that the model is loaded in."""
    from spider_sense.calibration import check_rates
    from spider_sense.models import load_model
    from spider_sense.training.config import read_sets
    from spider_sense.training.recalibration import benign_rows, recalibrate

    check_rates(suspect_fpr, breach_fpr)
    sets = read_sets(tuple(map(str, [*data, *(more or [])])), require_label=False)
    rows = benign_rows(guard, sets)
    loaded = load_model(model, dtype, device)
    with ExitStack() as stack:
        scratch = work or Path(stack.enter_context(TemporaryDirectory(prefix="spider-sense-")))
        done = recalibrate(
            guard,
            loaded,
            rows,
            scratch,
            out=out,
            respond=respond,
            max_tokens=max_tokens,
            suspect_fpr=suspect_fpr,
            breach_fpr=breach_fpr,
            progress=stack.enter_context(progress_bars()),
        )
    for record in done.guard.manifest.detectors:
        console.print(thresholds_table(record.name, record.calibration, done.before[record.name]))
        _warn(record.name, record.calibration)
    repeats = sum(map(len, sets.values())) - len(rows)
    typer.echo(f"calibrated on {len(rows)} conversations, {repeats} repeats left out; wrote {done.folder}")


def _warn(detector: str, calibration: "Calibration") -> None:
    """Say which thresholds rest on too little traffic, as the table's last column does."""
    weak = [
        threshold
        for bucket in calibration.buckets
        for threshold in (bucket.suspect, bucket.breach)
        if not threshold.supported
    ]
    if weak:
        worst = max(weak, key=lambda threshold: threshold.needed / threshold.n)
        typer.echo(
            f"warning: {len(weak)} thresholds of {detector} rest on too few conversations, one on {worst.n} where "
            f"{worst.needed} are needed for {worst.target_fpr:.1%}; do not act on its verdicts before it has seen more",
            err=True,
        )

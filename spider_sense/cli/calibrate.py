"""``spider-sense calibrate``."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.options import Device, Dtype, Model
from spider_sense.cli.progress import progress_bars
from spider_sense.cli.tables import thresholds_table
from spider_sense.cli.threshold_warnings import warn_of_stage, warn_of_thresholds
from spider_sense.errors import ConfigError

if TYPE_CHECKING:
    from spider_sense.calibration import Calibration
    from spider_sense.guard import Guard

__all__ = ["calibrate"]


@app.command()
def calibrate(
    guard: Annotated[Path, typer.Option(help="Guard folder.")],
    model: Model,
    data: Annotated[list[Path] | None, typer.Option(help="JSONL files of benign traffic; repeat or list them.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="JSONL file of an agent's benign conversations, for a guard of the stages.")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="Further JSONL files of --data.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the guard; by default it is replaced.")] = None,
    respond: Annotated[int, typer.Option(min=0, help="Tokens of response to each prompt of --data.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=32, help="Longer prompts of --data are cut in the middle.")] = 2048,
    suspect_fpr: Annotated[float, typer.Option(help="Share of benign traffic that may be suspect.")] = 0.05,
    breach_fpr: Annotated[float, typer.Option(help="Share of benign traffic that may be a breach.")] = 0.01,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    work: Annotated[
        Path | None, typer.Option(help="Keep captured activations of --data here, and resume from them.")
    ] = None,
) -> None:
    """Set a guard's thresholds on your own benign traffic, in the configuration that the model is loaded in."""
    from spider_sense.calibration import check_rates
    from spider_sense.models import load_model
    from spider_sense.training.config import read_sets
    from spider_sense.training.recalibration import benign_rows, recalibrate

    check_rates(suspect_fpr, breach_fpr)
    files = [*(data or []), *(more or [])]
    _check_traffic(guard, files, trace)
    if trace is not None:
        _stages(guard, model, trace, out, (suspect_fpr, breach_fpr), dtype, device)
        return
    sets = read_sets(tuple(map(str, files)), require_label=False)
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
    _show(done.guard, done.before)
    for record in done.guard.manifest.detectors:
        warn_of_thresholds(record.name, record.calibration)
    repeats = sum(map(len, sets.values())) - len(rows)
    typer.echo(f"calibrated on {len(rows)} conversations, {repeats} repeats left out; wrote {done.folder}")


def _check_traffic(folder: Path, files: Sequence[Path], trace: Path | None) -> None:
    """Check that there is one kind of traffic, and that it is what the guard reads."""
    from spider_sense.guard import Guard
    from spider_sense.screening.stage_guard import reads_stages

    if bool(files) == (trace is not None):
        raise ConfigError("name benign traffic with --data, or for a guard of the stages with --trace, and not both")
    if trace is None and reads_stages(Guard.from_pretrained(folder)):
        raise ConfigError(f"{folder} has probes of an agent's stages; name benign conversations with --trace")


def _stages(
    folder: Path, model: str, trace: Path, out: Path | None, rates: tuple[float, float], dtype: str, device: str
) -> None:
    """Calibrate a guard of the stages."""
    from spider_sense.guard import KIND
    from spider_sense.models import load_model
    from spider_sense.screening.reader import ChatSpans
    from spider_sense.screening.stage_calibration import calibrate_stages
    from spider_sense.screening.stage_guard import StageGuard
    from spider_sense.screening.trace import read_traces
    from spider_sense.screening.written_calls import ReplayReader

    target = out or folder
    KIND.check_replaceable(target)
    stages, traces = StageGuard.from_pretrained(folder), list(read_traces(trace))
    loaded = load_model(model, dtype, device)
    with progress_bars() as progress:
        task = progress.add_task("Calibrating", total=len(traces))
        done = calibrate_stages(
            stages,
            loaded,
            ReplayReader(ChatSpans(loaded.tokenizer)),
            traces,
            suspect_fpr=rates[0],
            breach_fpr=rates[1],
            advance=lambda count: progress.advance(task, count),
        )
    done.guard.save_pretrained(target)
    _show(done.guard, {record.name: record.calibration for record in stages.guard.manifest.detectors})
    kept = done.guard.manifest.training["recalibrated_on"]["kept"]
    for record in done.guard.manifest.detectors:
        if record.name not in kept:
            warn_of_stage(record.name, record.calibration)
    if kept:
        typer.echo(f"no span for {', '.join(kept)}, so the thresholds are those of before", err=True)
    typer.echo(f"calibrated on {len(traces)} conversations; wrote {target}")


def _show(guard: "Guard", before: "Mapping[str, Calibration]") -> None:
    for record in guard.manifest.detectors:
        console.print(thresholds_table(record.name, record.calibration, before[record.name]))

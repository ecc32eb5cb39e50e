"""``spider-sense train``."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spider_sense.cli.app import app, console
from spider_sense.cli.lines import Lines
from spider_sense.cli.tables import results_table, sweep_table
from spider_sense.cli.threshold_warnings import warn_of_thresholds
from spider_sense.config import load_yaml

__all__ = ["progress_bars", "train"]


def progress_bars() -> Progress:
    """Return the progress display of long work: bars, and lines on stderr where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    kind = Progress if sys.stderr.isatty() else Lines
    return kind(*columns, console=console, transient=not console.is_terminal)


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file with the training run, such as configs/train.yaml.")],
) -> None:
    """Capture activations, sweep probes, calibrate the best one and write a guard."""
    from spider_sense.training.config import TrainConfig
    from spider_sense.training.train import train as run

    settings = load_yaml(config, TrainConfig)
    with progress_bars() as progress:
        trained = run(settings, progress)
    for record in trained.guard.manifest.detectors:
        console.print(sweep_table(trained.sweeps[record.name]))
        console.print(results_table(trained.results[record.name]))
        warning = record.evidence["overall"].get("warning")
        if warning:
            console.print(f"[yellow]{warning}[/]")
        warn_of_thresholds(record.name, record.calibration)
    console.print(f"wrote {trained.folder}", markup=False)

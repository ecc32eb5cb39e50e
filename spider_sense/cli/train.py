"""``spider-sense train``."""

from pathlib import Path
from typing import Annotated

import typer

from spider_sense.cli.app import app, console
from spider_sense.cli.progress import progress_bars
from spider_sense.cli.tables import results_table, sweep_table
from spider_sense.cli.threshold_warnings import warn_of_thresholds

__all__ = ["train"]


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file with the training run, such as configs/train.yaml.")],
) -> None:
    """Capture activations, sweep probes, calibrate the best one and write a guard."""
    from spider_sense.config import load_yaml
    from spider_sense.training.config import TrainConfig
    from spider_sense.training.train import train as run

    settings = load_yaml(config, TrainConfig)
    with progress_bars() as progress:
        trained = run(settings, progress)
    dropped = trained.guard.manifest.training["dropped_repeats"]
    if dropped:
        console.print(f"{dropped} rows were left out: they repeat another, or share half of their text with a test row")
    for record in trained.guard.manifest.detectors:
        console.print(sweep_table(trained.sweeps[record.name]))
        console.print(results_table(trained.results[record.name]))
        warning = record.evidence["overall"].get("warning")
        if warning:
            console.print(f"[yellow]{warning}[/]")
        warn_of_thresholds(record.name, record.calibration)
    console.print(f"wrote {trained.folder}", markup=False)

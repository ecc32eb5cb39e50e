"""What the commands that set thresholds say of those that rest on too little traffic."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from spider_sense.calibration import Calibration

__all__ = ["warn_of_stage", "warn_of_thresholds"]


def warn_of_thresholds(detector: str, calibration: "Calibration") -> None:
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
            f"warning: {len(weak)} thresholds of {detector} rest on too little traffic, one on {worst.n} where "
            f"{worst.needed} are needed for {worst.target_fpr:.1%}; do not act on its verdicts before it has seen more",
            err=True,
        )


def warn_of_stage(stage: str, calibration: "Calibration") -> None:
    """Say that a breach counts as suspect where fewer spans were seen than its rate needs."""
    from spider_sense.calibration import least_for

    needed = least_for(calibration.breach_fpr)
    if calibration.n < needed:
        typer.echo(
            f"warning: a breach of {stage} counts as suspect: it rests on {calibration.n} spans, and "
            f"{calibration.breach_fpr:.1%} needs {needed}",
            err=True,
        )

"""The extraction detector beside every baseline, on simulated traffic: one table, two pictures, one line of JSON.

    SPIDER_SENSE_DATA=folder python bench/extraction.py --config configs/bench-extraction-quick.yaml

Without the folder the shipped texts alone are used. What is finished is kept and not done again.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from _extraction_pictures import draw_lifetime, draw_queries
from rich.console import Console
from rich.table import Table

from spider_sense.config import load_yaml
from spider_sense.extraction.bench.config import BenchConfig
from spider_sense.extraction.bench.report import Report, summarise
from spider_sense.extraction.bench.run import run_bench

CONSOLE = Console(stderr=True, width=180)
LAST_LINE = (
    "seeds",
    "lifetime_fpr",
    "lifetime_fpr_low",
    "lifetime_fpr_high",
    "control_alarm_rate",
    "pivot_median_queries",
    "pivot_half_median_queries",
    "campaign_median_queries",
    "group_tpr",
    "bytes_per_principal",
    "updates_per_second",
    "baselines",
)

DETAILS = (
    "worst_family",
    "missed",
    "lifetime_fpr_by_stratum",
    "lifetime_limited",
    "other_work_limited",
    "group_fpr",
    "group_fpr_one_subject",
    "group_curve",
    "adaptive left",
    "sweep",
    "load",
)


def main(
    config: Annotated[Path, typer.Option(help="What to compare.")],
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many seeds; the others can follow.")
    ] = None,
) -> None:
    """Run what is missing, print the table and the line, write report.json and the pictures beside it."""
    settings, begin = load_yaml(config, BenchConfig), time.monotonic()
    settings = settings.model_copy(update={"seeds": settings.seeds[:seeds]})
    results = run_bench(settings, lambda text: CONSOLE.print(f"{time.monotonic() - begin:6.0f} s  {text}"))
    report = summarise(results, settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw_queries(results.outcomes, settings, settings.output / "queries.png")
    draw_lifetime(report, settings, settings.output / "lifetime.png")
    show(report)
    typer.echo(json.dumps({key: report[key] for key in LAST_LINE}))


def show(report: Report) -> None:
    """Print what the report holds, one row a system and scene, then what is not a stream."""
    table = Table(
        "system", "embedding", "scene", "streams", "alarmed / found", "limited", "median requests", "by 64", "p90"
    )
    for row in report["systems"]:
        if "rate" in row:
            rate = f"{100 * row['rate']:.1f}% ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
            cells = [rate, f"{100 * row['limited']:.1f}%", "", "", ""]
        else:
            median = f"{_number(row['median_queries'])} ({_number(row['median_low'])}-{_number(row['median_high'])})"
            limited = f"{100 * row['limited']:.0f}%, {_number(row['median_to_limit'])}"
            cells = [f"{100 * row['found']:.0f}%", limited, median, f"{100 * row['found_by_64']:.0f}%"]
            cells.append(_number(row["p90_queries"]))
        table.add_row(row["system"], row["embedding"], row["scene"], str(row["streams"]), *cells)
    CONSOLE.print(table)
    for key in DETAILS:
        CONSOLE.print(f"{key}: {json.dumps(report.get(key))}")
    for key in report:
        if key.startswith("windows"):
            CONSOLE.print(f"{key}: {json.dumps(report[key])}")


def _number(value: Any) -> str:
    return "never" if value is None else f"{value:g}"


if __name__ == "__main__":
    typer.run(main)

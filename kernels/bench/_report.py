"""The figures of a run: rows of a CSV, a table, and one line of JSON."""

import argparse
import csv
import json
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from _bench import alternate
from rich.console import Console
from rich.table import Table

__all__ = ["Case", "Report", "report"]

_COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


@dataclass(frozen=True, slots=True)
class Case:
    """One workload of an operation."""

    name: str
    """Prefix of its keys in the JSON line."""
    rows: int
    """T, rows of the batch."""
    width: int
    """D."""
    count: int
    """Probes, patched neurons or signatures."""
    dtype: str
    moved: int
    """Bytes that must be read or written at least."""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@dataclass
class Report:
    """The figures of a run, written by :meth:`close`."""

    op: str
    device: torch.device
    rounds: int
    path: Path
    """The CSV."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source = torch.zeros(_COPY_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        taken = alternate({"copy": lambda: target.copy_(source)}, min(self.rounds, 10), self.device)["copy"]
        self.copy_gb_per_s = 2e-3 * len(source) / statistics.median(taken)
        """Bytes read and written in a second by the device's own copy: the ceiling."""
        self.machine = {
            "device": _device_name(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "date": datetime.now(UTC).date().isoformat(),
        }

    def add(self, case: Case, times: Mapping[str, list[float]]) -> None:
        """Take in the times of a case; a ratio is a baseline's time over ours in the same round, the median of them."""
        for variant, taken in times.items():
            fifths = statistics.quantiles(taken, n=5, method="inclusive")
            median = statistics.median(taken)
            self.rows.append(
                {
                    "op": self.op,
                    "variant": variant,
                    "case": case.name,
                    "T": case.rows,
                    "D": case.width,
                    "N": case.count,
                    "dtype": case.dtype,
                    "median_us": round(median, 2),
                    "p20_us": round(fifths[0], 2),
                    "p80_us": round(fifths[-1], 2),
                    "gb_per_s": round(1e-3 * case.moved / median, 3),
                    **self.machine,
                }
            )
            self.summary[f"{case.name}_{variant}_us"] = round(median, 2)
            if variant == "ours":
                self.summary[f"{case.name}_copy_share"] = round(1e-3 * case.moved / median / self.copy_gb_per_s, 4)
            else:
                ratios = [other / own for other, own in zip(taken, times["ours"], strict=True)]
                self.summary[f"{case.name}_{variant}_ratio"] = round(statistics.median(ratios), 3)

    @property
    def line(self) -> dict[str, Any]:
        """What the JSON line says: medians in microseconds, and ratios above 1 where ours is faster."""
        copied = {"copy_gb_per_s": round(self.copy_gb_per_s, 1)}
        return {"op": self.op, "rounds": self.rounds, **self.summary, **copied, **self.machine}

    def close(self) -> None:
        """Append to the CSV, show the table, and write the JSON line."""
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            if fresh:
                writer.writeheader()
            writer.writerows(self.rows)
        self._show()
        sys.stdout.write(json.dumps(self.line) + "\n")

    def _show(self) -> None:
        headings = "case", "variant", "T", "D", "N", "dtype", "median us", "p20", "p80", "GB/s", "of copy", "over ours"
        table = Table(*headings, title=f"{self.op}, {self.machine['device']}, {self.machine['threads']} threads")
        for row in self.rows:
            ratio = self.summary.get(f"{row['case']}_{row['variant']}_ratio", 1.0)
            cells = [row[name] for name in ("case", "variant", "T", "D", "N", "dtype")]
            cells += [f"{row[name]:.1f}" for name in ("median_us", "p20_us", "p80_us", "gb_per_s")]
            cells += [f"{row['gb_per_s'] / self.copy_gb_per_s:.1%}", f"{ratio:.2f}"]
            table.add_row(*map(str, cells))
        Console(width=max(140, Console().width)).print(table)


@contextmanager
def report(op: str, arguments: argparse.Namespace) -> Iterator[Report]:
    """Measure the device's copy, hand out a report, and close it if nothing was raised: no figures on a red gate."""
    made = Report(op, torch.device(arguments.device), 5 if arguments.quick else arguments.rounds, arguments.csv)
    with torch.inference_mode():
        yield made
    made.close()

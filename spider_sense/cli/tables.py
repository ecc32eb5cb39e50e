"""Tables of results, the same for training and evaluation."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from spider_sense.training.sweep import Sweep

__all__ = ["results_table", "sweep_table"]

_SYSTEMS = ("guard", "tfidf", "length", "random_direction", "shuffled_labels")


def results_table(results: Mapping[str, Any]) -> Table:
    """Return per file and overall: the guard, each control, and the rates at the guard's thresholds."""
    table = Table(title=f"Detector {results['detector']}")
    for name in (
        "set",
        "system",
        "n",
        "AUROC",
        "log AUROC",
        "TPR at 1% FPR",
        "TPR at 0.1% FPR",
        "at breach: FPR",
        "TPR",
    ):
        table.add_column(name, justify="left" if name in ("set", "system") else "right")
    for name, part in {**results["files"], "overall": results["overall"]}.items():
        for system in _SYSTEMS:
            # In a file of one class nothing but the rates at the thresholds can be measured.
            if system in part and (system == "guard" or part["guard"]["auroc"] is not None):
                table.add_row(*_row(name if system == "guard" else "", system, part))
        table.add_section()
    return table


def sweep_table(sweep: Sweep, rows: int = 12) -> Table:
    """Return the best candidates of a sweep."""
    table = Table(title=f"Validation, best {min(rows, len(sweep.candidates))} of {len(sweep.candidates)}")
    for name in ("family", "sites", "AUROC", "log AUROC", "TPR at 1% FPR"):
        table.add_column(name, justify="left" if name in ("family", "sites") else "right")
    for item in sweep.candidates[:rows]:
        sites = ", ".join(map(str, item.sites))
        table.add_row(item.probe.family, sites, f"{item.auroc:.3f}", f"{item.log_auroc:.3f}", f"{item.tpr:.3f}")
    return table


def _row(name: str, system: str, part: Mapping[str, Any]) -> list[str]:
    figures = part[system]
    breach = part["at_thresholds"]["breach"]
    rates = [_interval(breach["fpr"]), _interval(breach["tpr"])] if system == "guard" else ["", ""]
    return [
        name,
        system,
        str(figures["n"]) if system == "guard" else "",
        _number(figures["auroc"]),
        _number(figures["log_auroc"]),
        _interval(figures["tpr_at_1pct_fpr"]),
        _interval(figures["tpr_at_0_1pct_fpr"]),
        *rates,
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(rate: Mapping[str, float | None]) -> str:
    if rate["value"] is None:
        return "-"
    return f"{rate['value']:.3f} ({rate['low']:.3f}-{rate['high']:.3f})"

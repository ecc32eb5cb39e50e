"""Tables of results, the same for training and evaluation."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from spider_sense.cli.plain import plain

if TYPE_CHECKING:
    from spider_sense.calibration import Calibration, Threshold
    from spider_sense.training.sweep import Sweep

__all__ = ["evidence_table", "results_table", "sweep_table", "thresholds_table", "transforms_table"]

_SYSTEMS = ("guard", "tfidf", "length", "random_direction", "shuffled_labels")
_BEST = 12
"""Candidates of a sweep that are shown."""


def evidence_table(detector: str, overall: Mapping[str, Any]) -> Table:
    """Return what a guard's manifest says of a detector's test: the guard and each control on the same rows."""
    guard = overall["guard"]
    table = Table(
        title=f"Test of {detector} on {guard['n']} prompts, {guard['positives']} of them positive", box=box.SIMPLE_HEAD
    )
    for name in ("system", "AUROC", "log AUROC", "TPR at 1% FPR", "TPR at 0.1% FPR"):
        table.add_column(name, no_wrap=True, justify="left" if name == "system" else "right")
    for system in _SYSTEMS:
        if system in overall:
            table.add_row(system, *_figures(overall[system]))
    return table


def results_table(results: Mapping[str, Any]) -> Table:
    """Return per file and overall: the guard, each control, and the rates at the guard's thresholds."""
    caption = "Prompts alone were read; an answer can only raise a score, and with it the rates at breach."
    table = Table(title=f"Detector {results['detector']}", caption=caption)
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
        table.add_column(name, no_wrap=True, justify="left" if name in ("set", "system") else "right")
    for name, part in {**results["files"], **results["groups"], "overall": results["overall"]}.items():
        for system in _SYSTEMS:
            # In a file of one class nothing but the rates at the thresholds can be measured.
            if system in part and (system == "guard" or part["guard"]["auroc"] is not None):
                table.add_row(plain(name if system == "guard" else ""), *_row(system, part))
        table.add_section()
    return table


def sweep_table(sweep: "Sweep") -> Table:
    """Return the best candidates of a sweep."""
    table = Table(title=f"Validation, best {min(_BEST, len(sweep.candidates))} of {len(sweep.candidates)}")
    for name in ("family", "sites", "AUROC", "log AUROC", "TPR at 1% FPR"):
        table.add_column(name, justify="left" if name in ("family", "sites") else "right")
    for item in sweep.candidates[:_BEST]:
        sites = ", ".join(map(str, item.sites))
        table.add_row(item.probe.family, sites, f"{item.auroc:.3f}", f"{item.log_auroc:.3f}", f"{item.tpr:.3f}")
    return table


def thresholds_table(detector: str, calibration: "Calibration", before: "Calibration | None" = None) -> Table:
    """Return the thresholds of a detector by prompt length, and those that they replaced beside them.

    A detector of an agent's stages has thresholds by the length of its spans.
    """
    from spider_sense.calibration import least_for
    from spider_sense.screening.stage_guard import DETECTORS

    staged = detector in DETECTORS
    rows = "spans" if staged else "conversations"
    title = f"Thresholds of {detector}, set on {calibration.n} benign {rows}, {calibration.created}"
    caption = f"nothing is known of {'spans' if staged else 'prompts'} of more than {calibration.horizon_tokens} tokens"
    caption += "\n" if staged else f", or of responses of more than {calibration.response_tokens}\n"
    caption += f"needed: benign {rows} from which the target rate can be claimed at 95% confidence"
    if any(bucket.pooled for bucket in calibration.buckets):
        caption += f"\n*: {rows} of every length, too few were as long as this"
    if staged and calibration.n < least_for(calibration.breach_fpr):
        caption += f"\na breach counts as suspect: {calibration.n} spans, and {calibration.breach_fpr:.1%} needs "
        caption += f"{least_for(calibration.breach_fpr)}"
    table = Table(title=plain(title), caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    old = [] if before is None else ["before"]
    for name in ("tokens", "level", *old, "from", "target", "FPR, 95%", "n", "needed", "supported"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("level", "supported") else "right")
    low = 1
    for bucket in calibration.buckets:
        tokens = f"{low}+" if bucket.max_tokens is None else f"{low}-{bucket.max_tokens}"
        for level, item in (("suspect", bucket.suspect), ("breach", bucket.breach)):
            replaced = [] if before is None else [f"{getattr(before.thresholds(low), level).value:.3f}"]
            name = tokens + "*" * bucket.pooled if level == "suspect" else ""
            table.add_row(name, level, *replaced, *_threshold_row(item))
        low = (bucket.max_tokens or 0) + 1
    return table


def transforms_table(results: Mapping[str, Any]) -> Table:
    """Return what :func:`spider_sense.evasion.evasion_table` found, a row for each transform."""
    caption = "each transform is applied to both sides of a pair: if FPR rises with TPR, the wrapper is flagged"
    table = Table(title=f"Evasion of {results['detector']}", caption=caption, box=box.SIMPLE_HEAD)
    for name in ("transform", "n", "tokens", "AUROC", "suspect: FPR", "TPR", "breach: FPR", "TPR"):
        table.add_column(name, justify="left" if name == "transform" else "right")
    for name, part in results["transforms"].items():
        levels = [part["at_thresholds"][level] for level in ("suspect", "breach")]
        rates = [_interval(level[rate]) for level in levels for rate in ("fpr", "tpr")]
        table.add_row(name, str(part["n"]), str(part["tokens"]), _number(part["auroc"]), *rates)
    return table


def _threshold_row(item: "Threshold") -> list[str]:
    rate = f"{item.fpr_low:.1%}-{item.fpr_high:.1%}"
    supported = "yes" if item.supported else "no"
    return [f"{item.value:.3f}", f"{item.target_fpr:.1%}", rate, str(item.n), str(item.needed), supported]


def _row(system: str, part: Mapping[str, Any]) -> list[str]:
    figures = part[system]
    breach = part["at_thresholds"]["breach"]
    rates = [_interval(breach["fpr"]), _interval(breach["tpr"])] if system == "guard" else ["", ""]
    return [
        system,
        str(figures["n"]) if system == "guard" else "",
        *_figures(figures),
        *rates,
    ]


def _figures(figures: Mapping[str, Any]) -> list[str]:
    areas = [_number(figures[name]) for name in ("auroc", "log_auroc")]
    return areas + [_interval(figures[name]) for name in ("tpr_at_1pct_fpr", "tpr_at_0_1pct_fpr")]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(rate: Mapping[str, float | None]) -> str:
    if rate["value"] is None:
        return "-"
    return f"{rate['value']:.3f} ({rate['low']:.3f}-{rate['high']:.3f})"

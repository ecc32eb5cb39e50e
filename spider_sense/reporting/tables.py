"""Tables and bars of the page: systems, thresholds, candidates."""

import html
from collections.abc import Sequence

from spider_sense.calibration import BucketThresholds, Calibration, Threshold
from spider_sense.reporting.limits import interval, percent
from spider_sense.reporting.report import DetectorFacts, SweepPoint

__all__ = ["candidate_bars", "systems_table", "thresholds_table"]

BARS = 10


def systems_table(detector: DetectorFacts) -> str:
    """Return the guard and its controls as rows."""
    head = _row("th", ["System", "AUROC", "log AUROC", "TPR at 1% FPR", "95% interval"])
    rows = [
        _row(
            "td",
            [
                f'<span class="key s-{html.escape(system.name)}"></span>{html.escape(system.title)}',
                _number(system.auroc),
                _number(system.log_auroc),
                percent(system.tpr),
                interval(system.tpr),
            ],
            "lead" if system.name == "guard" else "",
        )
        for system in detector.systems
    ]
    return _table(head, rows)


def thresholds_table(calibration: Calibration) -> str:
    """Return the two thresholds of every length bucket, with what supports them."""
    names = [
        "Prompt tokens",
        "Zone",
        "Threshold",
        "Benign n",
        "At or above",
        "FPR, 95% interval",
        "Needed",
        "Supported",
    ]
    rows, low = [], 1
    for bucket in calibration.buckets:
        rows += _bucket(bucket, low)
        low = (bucket.max_tokens or 0) + 1
    return _table(_row("th", names), rows)


def candidate_bars(candidates: Sequence[SweepPoint]) -> str:
    """Return the best of some candidates as bars; the longest bar is the best one."""
    if not candidates:
        return ""
    best = max(candidate.tpr for candidate in candidates) or 1.0
    return f'<ol class="bars">{"".join(_bar(item, item.tpr / best) for item in candidates[:BARS])}</ol>'


def _bar(item: SweepPoint, share: float) -> str:
    where = f"at {item.sites[0]}" if len(item.sites) == 1 else f"over {len(item.sites)} sites"
    name = f"{item.family.replace('_', ' ')} {where}{' (chosen)' if item.chosen else ''}"
    return (
        f'<li{" class=chosen" if item.chosen else ""} title="{html.escape(", ".join(item.sites))}">'
        f"<span>{html.escape(name)}</span>"
        f'<span class="bar"><span style="width:{100 * share:.1f}%"></span></span><b>{percent(item.tpr)}</b></li>'
    )


def _bucket(bucket: BucketThresholds, low: int) -> list[str]:
    name = f"from {low}" if bucket.max_tokens is None else f"{low} to {bucket.max_tokens}"
    if bucket.pooled:
        name += ' <span class="quiet">(pooled)</span>'
    return [
        _row("td", [name, "suspect", *_threshold(bucket.suspect)], "first"),
        _row("td", ["", "breach", *_threshold(bucket.breach)]),
    ]


def _threshold(threshold: Threshold) -> list[str]:
    return [
        f"{threshold.value:.3f}",
        str(threshold.n),
        str(threshold.exceed),
        f"{percent(threshold.fpr_low)} to {percent(threshold.fpr_high)}",
        f"{threshold.needed} for {percent(threshold.target_fpr)}",
        "yes" if threshold.supported else "<strong>no</strong>",
    ]


def _row(cell: str, values: list[str], style: str = "") -> str:
    cells = "".join(f"<{cell}>{value}</{cell}>" for value in values)
    return f'<tr class="{style}">{cells}</tr>' if style else f"<tr>{cells}</tr>"


def _table(head: str, rows: list[str]) -> str:
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"

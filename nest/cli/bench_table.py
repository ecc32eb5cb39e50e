"""The table of the comparison: one row an arm."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from nest.cli.eval_tables import change, relative_change
from spider_sense.cli.plain import plain

__all__ = ["arms_table"]

_SHARES = {
    "asr": "ASR",
    "asr_jailbreak": "ASR jailbreak",
    "over_refusal": "over-refusal",
    "over_refusal_borderline": "borderline",
    "utility": "utility",
}


def arms_table(arms: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return every arm's figures in percent with 95% intervals over prompts, and how they differ from ``nest``'s."""
    caption = (
        "mean over an arm's runs, and the deviation (sd) over them; 95% bootstrap intervals over prompts; "
        "second lines: difference from nest, by prompt; shares in points, perplexity in percent"
    )
    table = Table(title="Arms", caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("arm", no_wrap=True)
    for name in ("runs", *_SHARES.values(), "ASR sd", "perplexity", "KL", "trained", "KiB", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, figures in arms.items():
        cells = [_share(figures, key) for key in _SHARES]
        table.add_row(
            plain(arm),
            str(figures["runs"]),
            *cells,
            _number(_percent(figures["sd"].get("asr")), ".1f"),
            _number(figures.get("perplexity"), ".2f"),
            _number(figures.get("kl"), ".3f"),
            _number(figures.get("trained_share"), ".3%"),
            _number(None if figures["patch_bytes"] is None else figures["patch_bytes"] / 1024, ".0f"),
            _number(figures["seconds"], ".0f"),
        )
        if differences := figures.get("versus_nest"):
            cells = [change(differences.get(key)) for key in _SHARES]
            table.add_row("", "", *cells, "", relative_change(differences.get("perplexity")), style="dim")
    return table


def _share(figures: Mapping[str, Any], key: str) -> str:
    if figures[key] is None:
        return "-"
    low, high = figures["intervals"][key]
    return f"{100 * figures[key]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

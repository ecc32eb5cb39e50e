"""Tables of an evaluation, and of several side by side."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table

from spider_sense.cli.plain import plain

__all__ = ["change", "comparison_table", "relative_change", "result_table"]

_RATES = {
    "asr": "attack success, direct",
    "asr_jailbreak": "attack success, jailbreak wrappers",
    "over_refusal": "over-refusal, ordinary prompts",
    "over_refusal_borderline": "over-refusal, borderline prompts",
    "over_refusal_wrapped": "over-refusal, wrapped benign prompts",
}
_OTHERS = {"perplexity": "perplexity", "kl": "KL(base || model), nats a token"}
_SHORT = {
    "asr": "ASR",
    "asr_jailbreak": "ASR jailbreak",
    "over_refusal": "over-refusal",
    "over_refusal_borderline": "borderline",
    "utility": "utility",
}


def result_table(result: Mapping[str, Any]) -> Table:
    """Return every figure of an evaluation with its interval, by both judges."""
    caption = "95% bootstrap intervals over prompts; a judge sees wording, not whether an answer would do harm"
    table = Table(title=plain(f"{result['model']}, {_arm(result)}"), caption=caption, box=box.SIMPLE_HEAD)
    for name in ("figure", "n", "phrase list", "classifier"):
        table.add_column(name, no_wrap=True, justify="left" if name == "figure" else "right")
    for key, name in _RATES.items():
        if result[key] is not None:
            table.add_row(name, str(result[key]["n"]), _share(result[key]), _share(result[key + "_classifier"]))
    for attack, figures in result["attacks"].items():
        table.add_row(
            f"attack success, {attack}",
            str(figures["asr"]["n"]),
            _share(figures["asr"]),
            _share(figures["asr_classifier"]),
        )
    for row in _other_rows(result):
        table.add_row(*row)
    table.add_row("seconds", "", f"{result['seconds']:.0f}", "")
    return table


def _other_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for task, figures in result["tasks"].items():
        figure = figures[figures["figure"]]
        yield f"{task}, {figures['figure'].replace('_', ' ')}", str(figure["n"]), _share(figure), ""
    if result["utility"] is not None:
        yield "utility, mean of tasks", str(result["utility"]["n"]), _share(result["utility"]), ""
    for key, name in _OTHERS.items():
        if result[key] is not None:
            yield name, str(result[key]["n"]), _number(result[key]), ""


def comparison_table(results: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return results side by side, each with its paired difference from the first below it.

    Args:
        results: by name; the first is the base of the differences.
        changes: for each other name, what :func:`nest.figures.differences` returned.
    """
    caption = "second lines: difference from the first, paired by prompt; shares in points, perplexity in percent"
    table = Table(title="Evaluations", caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    for heading in (*_SHORT.values(), "perplexity"):
        table.add_column(heading, no_wrap=True, justify="right")
    for name, result in results.items():
        table.add_row(plain(name), *(_share(result[key]) for key in _SHORT), _number(result["perplexity"]))
        if name in changes:
            shares = [change(changes[name].get(key)) for key in _SHORT]
            table.add_row("", *shares, relative_change(changes[name].get("perplexity")), style="dim")
    return table


def _arm(result: Mapping[str, Any]) -> str:
    arm = result["arm"]
    return f"patch {arm['patch']} at alpha {arm['alpha']:g}" if arm.get("patch") else "no patch"


def _share(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['value']:.1%} ({figure['low']:.1%}-{figure['high']:.1%})"


def _number(figure: Mapping[str, float] | None) -> str:
    return "-" if figure is None else f"{figure['value']:.4g} ({figure['low']:.4g}-{figure['high']:.4g})"


def change(figure: Mapping[str, float] | None) -> str:
    """Return a difference of shares in percentage points with its interval; nothing for None."""
    if figure is None:
        return ""
    return f"{100 * figure['value']:+.1f} ({100 * figure['low']:+.1f}, {100 * figure['high']:+.1f})"


def relative_change(figure: Mapping[str, float] | None) -> str:
    """Return a relative change in percent with its interval; nothing for None."""
    if figure is None:
        return ""
    return f"{figure['value']:+.1%} ({figure['low']:+.1%}, {figure['high']:+.1%})"

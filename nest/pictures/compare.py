"""Safety against what it costs: every arm a point with its intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nest.pictures.canvas import COLOURS, axes, write_png
from spider_sense.errors import ConfigError, DataError, nearest
from spider_sense.reporting.pieces import printable

__all__ = ["AGAINST", "draw_comparison"]

AGAINST: Mapping[str, str] = {
    "utility": "utility: mean accuracy of the tasks, %",
    "over_refusal": "over-refusal on ordinary prompts, %",
    "over_refusal_borderline": "over-refusal on borderline prompts, %",
    "perplexity": "perplexity",
    "kl": "KL(base || model) on benign answers, nats a token",
}
"""What may stand on the horizontal axis."""
_SHARES = ("utility", "over_refusal", "over_refusal_borderline")
_KINDS = {"asr": ("o", "direct"), "asr_jailbreak": ("^", "jailbreak wrappers")}
SIZE = (8.0, 5.0)


def draw_comparison(results: Mapping[str, Mapping[str, Any]], against: str, path: Path) -> None:
    """Draw attack success of each result over another figure, and write the PNG.

    Args:
        results: by name, as ``nest eval`` wrote them.
        against: a key of `AGAINST`.
        path: the picture.

    Raises:
        ConfigError: if there is no such axis.
        DataError: if a result lacks a figure.
    """
    if against not in AGAINST:
        raise ConfigError(f"cannot draw attack success against {against!r}; {nearest(against, AGAINST)}")
    for name, result in results.items():
        lacking = [key for key in ("asr", against) if result.get(key) is None]
        if lacking:
            raise DataError(f"{name} has no {lacking[0]}; evaluate it with prompts or tasks for that")
    picture = axes("Attack success: lower is safer", AGAINST[against], "answers that do not refuse, %", SIZE)
    for index, (name, result) in enumerate(results.items()):
        _points(picture, printable(name), result, against, COLOURS[index % len(COLOURS)])
    picture.set_ylim(-4, 104)
    picture.grid(axis="both", alpha=0.3)
    picture.figure.legend(frameon=False, loc="outside right upper", fontsize="small")
    write_png(picture, path)


def _points(picture: Any, name: str, result: Mapping[str, Any], against: str, colour: str) -> None:
    x, x_error = _point(result[against], 100.0 if against in _SHARES else 1.0)
    for key, (marker, kind) in _KINDS.items():
        if result.get(key) is not None:
            y, y_error = _point(result[key], 100.0)
            picture.errorbar(
                [x],
                [y],
                xerr=x_error,
                yerr=y_error,
                fmt=marker,
                color=colour,
                markerfacecolor=colour if key == "asr" else "white",
                capsize=3,
                label=f"{name}, {kind}",
            )


def _point(figure: Mapping[str, float], scale: float) -> tuple[float, list[list[float]]]:
    """Return a figure, and how far its interval reaches below and above it, as matplotlib takes them."""
    value, low, high = (scale * figure[key] for key in ("value", "low", "high"))
    return value, [[max(value - low, 0.0)], [max(high - value, 0.0)]]

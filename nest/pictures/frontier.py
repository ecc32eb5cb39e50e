"""The frontier: attack success against over-refusal, every arm a curve over the strength of its change."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nest.pictures.canvas import COLOURS, axes, write_png
from spider_sense.reporting.pieces import printable

__all__ = ["draw_frontier"]

SIZE = (8.0, 5.5)
Points = Mapping[str, Mapping[str, Any]]
"""Results by strength."""


def draw_frontier(frontiers: Mapping[str, Points], base: Mapping[str, Any], path: Path) -> None:
    """Draw a curve for each arm, from the base model on, and write the PNG.

    Args:
        frontiers: by arm, results by strength.
        base: result of the model as it came.
        path: the picture.
    """
    picture = axes(
        "Attack success against over-refusal, by strength of the change",
        "refused borderline benign prompts, %",
        "answered harmful prompts, %",
        SIZE,
    )
    for index, (arm, points) in enumerate(frontiers.items()):
        results = [base, *(points[strength] for strength in sorted(points, key=float))]
        _curve(picture, printable(arm), results, COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--")
    picture.set_xlim(-3, 103)
    picture.set_ylim(-3, 103)
    picture.grid(axis="both", alpha=0.3)
    picture.figure.legend(frameon=False, loc="outside right upper", fontsize="small")
    write_png(picture, path)


def _curve(picture: Any, name: str, results: list[Mapping[str, Any]], colour: str, line: str) -> None:
    across = [_figure(result["over_refusal_borderline"]) for result in results]
    up = [_figure(result["asr"]) for result in results]
    picture.errorbar(
        [value for value, _, _ in across],
        [value for value, _, _ in up],
        xerr=[[low for _, low, _ in across], [high for _, _, high in across]],
        yerr=[[low for _, low, _ in up], [high for _, _, high in up]],
        fmt="o" + line,
        color=colour,
        markersize=4,
        linewidth=1.3,
        elinewidth=0.6,
        label=name,
    )


def _figure(figure: Mapping[str, float]) -> tuple[float, float, float]:
    """Return a share in percent, and how far its interval reaches below and above it."""
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return value, max(value - low, 0.0), max(high - value, 0.0)

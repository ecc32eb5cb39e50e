"""The frontier: attack success against over-refusal, every arm a curve over strength, and one over training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nest.pictures.canvas import COLOURS, panels, write_png
from spider_sense.reporting.pieces import printable

__all__ = ["draw_frontier"]

SIZE = (12.0, 5.5)
Points = Mapping[str, Mapping[str, Any]]
"""Results by strength or steps."""
_PANELS = {"alpha": "over the strength of the change", "steps": "over training"}


def draw_frontier(frontiers: Mapping[str, Mapping[str, Points]], path: Path) -> None:
    """Draw every arm's curves, from the base model on, and write the PNG.

    Args:
        frontiers: by arm, results by strength (``alpha``) and by steps of training (``steps``); ``base`` holds the
            point that all begin at.
        path: the picture.
    """
    start = frontiers["base"]["alpha"]["0"]
    arms = {arm: curves for arm, curves in frontiers.items() if arm != "base"}
    drawn = [by for by in _PANELS if any(curves[by] for curves in arms.values())]
    pictures = panels(
        [f"Attack success against over-refusal, {_PANELS[by]}" for by in drawn],
        "refused borderline benign prompts, %",
        "answered harmful prompts, %",
        SIZE if len(drawn) > 1 else (8.0, 5.5),
    )
    for by, picture in zip(drawn, pictures, strict=True):
        for index, (arm, curves) in enumerate(arms.items()):
            if curves[by]:
                results = [start, *(curves[by][at] for at in sorted(curves[by], key=float))]
                line = "-" if index < len(COLOURS) else "--"
                label = printable(arm) if by == drawn[0] else None
                _curve(picture, label, results, COLOURS[index % len(COLOURS)], line)
        picture.set_xlim(-3, 103)
        picture.set_ylim(-3, 103)
        picture.grid(axis="both", alpha=0.3)
    pictures[0].figure.legend(frameon=False, loc="outside right upper", fontsize="small")
    write_png(pictures[0], path)


def _curve(picture: Any, name: str | None, results: list[Mapping[str, Any]], colour: str, line: str) -> None:
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

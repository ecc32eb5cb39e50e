"""The frontier: attack success against over-refusal, every arm a curve over strength, and one over training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nest.pictures.canvas import COLOURS, legend, panels, points, write_png
from spider_sense.printable import printable

__all__ = ["draw_frontier"]

SIZE, SIZE_OF_ONE = (12.0, 5.5), (8.0, 5.5)
Points = Mapping[str, Mapping[str, Any]]
"""Results by strength or steps."""
_PANELS = {"alpha": "over the strength of the change", "steps": "over training"}
_ACROSS, _UP = "over_refusal_borderline", "asr"
_FORMS = ("o-", "s--", "^:")
"""Of arms that share a colour."""


def draw_frontier(frontiers: Mapping[str, Mapping[str, Points]], path: Path) -> None:
    """Draw every arm's curves, from the base model on, and write the PNG.

    Args:
        frontiers: by arm, results by strength (``alpha``) and by steps of training (``steps``); ``base`` holds the
            point that all begin at.
        path: the picture.
    """
    start = frontiers["base"]["alpha"]["0"]
    drawn = [by for by in _PANELS if any(curves[by] for arm, curves in frontiers.items() if arm != "base")]
    pictures = panels(
        [_PANELS[by] for by in drawn],
        "refused borderline benign prompts, %",
        "answered harmful prompts, %",
        SIZE if len(drawn) > 1 else SIZE_OF_ONE,
        heading="Attack success against refused borderline prompts: nearer to the corner is better",
    )
    for by, picture in zip(drawn, pictures, strict=True):
        for index, (arm, curves) in enumerate(frontiers.items()):
            results = [] if arm == "base" else [curves[by][at] for at in sorted(curves[by], key=float)]
            if results or arm == "base":
                colour, form = COLOURS[index % len(COLOURS)], _FORMS[index // len(COLOURS) % len(_FORMS)]
                _curve(picture, printable(arm), [start, *results], colour, form)
        picture.set_ylim(-3, 103)
        picture.set_xlim(-1, _right(frontiers))
        picture.grid(axis="both", alpha=0.3)
    legend(pictures[0])
    write_png(pictures[0], path)


def _curve(picture: Any, name: str, results: list[Mapping[str, Any]], colour: str, form: str) -> None:
    across, up = ([_percent(result[key]) for result in results] for key in (_ACROSS, _UP))
    points(picture, across, up, colour, form, name)


def _percent(figure: Mapping[str, float]) -> dict[str, float]:
    return {key: 100 * figure[key] for key in ("value", "low", "high")}


def _right(frontiers: Mapping[str, Mapping[str, Points]]) -> float:
    """Return where the horizontal axis ends, in percent: just beyond all intervals."""
    highest = max(
        point[_ACROSS]["high"] for curves in frontiers.values() for curve in curves.values() for point in curve.values()
    )
    return min(103.0, 100 * float(highest) + 2)
